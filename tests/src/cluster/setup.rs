//! What a cluster is given before anything of it runs: secrets, certificates, configurations.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use super::{Builder, Cluster, DOMAIN, PEOPLE};
use crate::hosts::{Host, Settings, quote, quote_path};
use crate::postgres::{Postgres, SUPERUSER};
use crate::{example, wait};

/// What the policy of a database's host says beside the example's, so that it may rehearse.
const REHEARSES: &str = r#"
[[allow]]
action = "release.*"

[[allow]]
action = "check.command"

[[allow]]
action = "postgres.rehearse"
"#;

impl Cluster {
    pub(super) fn make_secrets(&mut self) -> Result<()> {
        let names = [
            "superuser_password",
            "migrator_password",
            "app_password",
            "secret_key",
            "admin_password",
            "slack_webhook",
        ];
        for name in names {
            let value = format!("canary-{}-{}", name.replace('_', "-"), token()?);
            self.secrets.insert(name.to_owned(), value);
        }
        Ok(())
    }

    pub(super) fn start_database(&mut self) -> Result<()> {
        let password = self.root().join("superuser");
        fs::write(&password, &self.secrets["superuser_password"])?;
        fs::set_permissions(&password, Permissions::from_mode(0o600))?;
        let postgres = Postgres::start(&self.root().join("postgres"), &password)?;
        fs::remove_file(&password)?;
        example::make_database(
            &postgres,
            &self.secrets["migrator_password"],
            &self.secrets["app_password"],
        )?;
        self.postgres = Some(postgres);
        example::make_history(&self.git())?;
        let backups = self.root().join("backups");
        Ok(fs::create_dir_all(backups.join("production"))?)
    }

    pub(super) fn make_certificates(&self, hosts: &[(String, String)]) -> Result<()> {
        let pki = self.pki();
        let pki = pki
            .to_str()
            .context("the temporary directory's path is UTF-8")?;
        self.make_certificate(&["init", "--dir", pki, "--domain", DOMAIN])?;
        let at = ["--dir", pki, "--out", pki];
        let mut arguments = vec!["controller", "main", "--address", "localhost"];
        arguments.extend(["--address", "127.0.0.1"]);
        arguments.extend(at);
        self.make_certificate(&arguments)?;
        for (host, _) in hosts {
            let mut arguments = vec!["agent", host];
            arguments.extend(at);
            self.make_certificate(&arguments)?;
        }
        for (name, groups) in PEOPLE {
            let mut arguments = vec!["operator", name];
            for group in groups {
                arguments.extend(["--group", group]);
            }
            arguments.extend(at);
            self.make_certificate(&arguments)?;
        }
        Ok(())
    }

    pub(super) fn configure_controller(&self) -> Result<()> {
        let directory = self.root().join("controller");
        let secrets = directory.join("secrets");
        fs::create_dir_all(&secrets)?;
        let listen = if self.address.is_empty() {
            "127.0.0.1:0".to_owned()
        } else {
            self.address.clone()
        };
        let pki = self.pki();
        let file = |name: &str| quote_path(&pki.join(name));
        let text = format!(
            "listen = {}\nstate_dir = {}\ndomain = {}\nsecrets_dir = {}\n\n\
             [tls]\ncert = {}\nkey = {}\nagent_ca = {}\noperator_ca = {}\n\n\
             [email]\nhost = \"127.0.0.1\"\nport = {}\nsecurity = \"none\"\n\
             from = \"Lockstep <lockstep@company.com>\"\n",
            quote(&listen),
            quote_path(&directory.join("state")),
            quote(DOMAIN),
            quote_path(&secrets),
            file("controller-main.crt"),
            file("controller-main.key"),
            file("ca-agents.crt"),
            file("ca-operators.crt"),
            self.mailbox.port,
        );
        let enrol = self.enrol.as_ref().map_or_else(String::new, |life| {
            format!(
                "\n[enroll]\nagent_ca_key = {}\ncontroller_ca = {}\nlife = {}\n",
                file("ca-agents.key"),
                file("ca-controllers.crt"),
                quote(life),
            )
        });
        let journal = self.compact_above.map_or_else(String::new, |records| {
            format!("\n[journal]\ncompact_above = {records}\n")
        });
        let text = text + &enrol + &journal;
        Ok(fs::write(directory.join("controller.toml"), text)?)
    }

    pub(super) fn make_profiles(&self) -> Result<()> {
        let pki = self.pki();
        for (name, _) in PEOPLE {
            let directory = self.root().join("operators").join(name);
            fs::create_dir_all(&directory)?;
            let text = format!(
                "controller = {}\nca = {}\ncert = {}\nkey = {}\n",
                quote(&self.address),
                quote_path(&pki.join("ca-controllers.crt")),
                quote_path(&pki.join(format!("operator-{name}.crt"))),
                quote_path(&pki.join(format!("operator-{name}.key"))),
            );
            fs::write(directory.join("profile.toml"), text)?;
        }
        Ok(())
    }

    pub(super) fn make_hosts(&mut self, builder: &Builder) -> Result<()> {
        let network = free_network()?;
        let hosts = self.root().join("hosts");
        fs::create_dir_all(&hosts)?;
        spread(&hosts);
        for ((name, role), number) in builder.hosts.iter().zip(10..) {
            let root = hosts.join(name);
            let address = format!("{network}.{number}");
            let mut host = Host::new(root, name, address, self.binaries.agent.clone())?;
            for (variable, value) in builder.agent_env.get(name).into_iter().flatten() {
                let value = value.replace("@HOST@", &host.root.display().to_string());
                host.agent_env.push((variable.clone(), value));
            }
            let policy = match builder.policies.get(name) {
                Some(policy) => policy.clone(),
                None => Some(self.example_policy(&host, role)?),
            };
            let more = builder.rehearsing && role == "db";
            let policy = policy.map(|policy| if more { policy + REHEARSES } else { policy });
            let mut settings = self.settings(&host, role, policy, builder);
            if let Some(tables) = builder.tables.get(name) {
                let root = host.root.display().to_string();
                settings.tables += &tables.replace("@HOST@", &root);
            }
            host.configure(&settings)?;
            for (name, value) in self.host_secrets(role) {
                let wrong = builder.secrets.get(&name).cloned();
                host.secret(&name, &wrong.unwrap_or(value))?;
            }
            self.hosts.insert(name.clone(), host);
        }
        Ok(())
    }

    /// The policy that the example gives to hosts of a role, with this host's own paths.
    pub fn example_policy(&self, host: &Host, role: &str) -> Result<String> {
        let file = example::directory()
            .join("hosts")
            .join(role)
            .join("policy.toml");
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let here = |path: PathBuf| path.display().to_string();
        Ok(text
            .replace("/var/www/employee-system", &here(host.app()))
            .replace("/var/log/employee-system", &here(host.root.join("log")))
            .replace("/srv/git/employee-system", &here(self.git()))
            .replace(
                "\"/backups",
                &format!("\"{}", here(self.root().join("backups"))),
            ))
    }

    fn host_secrets(&self, role: &str) -> BTreeMap<String, String> {
        let mut secrets = BTreeMap::new();
        let Some(postgres) = &self.postgres else {
            return secrets;
        };
        let mut add = |name: &str, value: String| secrets.insert(name.to_owned(), value);
        let value = |name: &str| self.secrets[name].clone();
        let url = |user: &str, password: String| {
            let port = postgres.port;
            format!(
                "postgresql://{user}:{password}@127.0.0.1:{port}/{}",
                example::DATABASE
            )
        };
        if role == "db" {
            add("superuser_password", value("superuser_password"));
        } else {
            add("migrator_password", value("migrator_password"));
            add(
                "migrator_database_url",
                url("employee_migrator", value("migrator_password")),
            );
            add(
                "app_database_url",
                url("employee_app", value("app_password")),
            );
            add("secret_key", value("secret_key"));
            add("admin_password", value("admin_password"));
        }
        secrets
    }

    fn settings(
        &self,
        host: &Host,
        role: &str,
        policy: Option<String>,
        builder: &Builder,
    ) -> Settings {
        let certificate = |kind: &str| self.pki().join(format!("agent-{}.{kind}", host.name));
        let labels = [("role", role), ("env", "prod")];
        let log = host.root.join("log/app.log");
        let vars = [
            ("address", host.address.clone()),
            ("data", host.root.display().to_string()),
            ("app_root", host.app().display().to_string()),
            ("log_file", log.display().to_string()),
            ("effects_file", host.effects().display().to_string()),
            ("backups", self.root().join("backups").display().to_string()),
        ];
        let tables = match (role, &self.postgres) {
            (_, None) => String::new(),
            ("db", Some(postgres)) if builder.rehearsing => {
                Self::database_table(host, postgres, builder) + &app_table(host, builder)
            }
            ("db", Some(postgres)) => Self::database_table(host, postgres, builder),
            (_, Some(postgres)) => app_tables(host, postgres, builder),
        };
        Settings {
            controller: self.address.clone(),
            tls: [
                self.pki().join("ca-controllers.crt"),
                certificate("crt"),
                certificate("key"),
            ],
            labels: labels
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            vars: vars.map(|(name, value)| (name.to_owned(), value)).into(),
            tables,
            policy,
        }
    }

    fn database_table(host: &Host, postgres: &Postgres, builder: &Builder) -> String {
        let backups = builder
            .backup_dir
            .clone()
            .unwrap_or_else(|| host.root.join("backups"));
        format!(
            "[postgres.{}]\nhost = {}\nport = {}\nuser = {}\npassword = \"superuser_password\"\n\
             backup_dir = {}\n",
            example::DATABASE,
            quote_path(postgres.socket()),
            postgres.port,
            quote(SUPERUSER),
            quote_path(&backups),
        )
    }
}

/// The application, and what its builds find.
fn app_table(host: &Host, builder: &Builder) -> String {
    let mut env = example::package_indexes();
    env.insert(
        "MIGRATION_LEDGER".to_owned(),
        host.migrations().display().to_string(),
    );
    let caches = crate::target().join("cache");
    env.insert(
        "PIP_CACHE_DIR".to_owned(),
        caches.join("pip").display().to_string(),
    );
    env.insert(
        "npm_config_cache".to_owned(),
        caches.join("npm").display().to_string(),
    );
    env.insert("PYTHONDONTWRITEBYTECODE".to_owned(), "1".to_owned());
    if let Some(path) = &builder.agent_path {
        env.insert("PATH".to_owned(), path.clone());
    }
    let lines = env
        .iter()
        .map(|(name, value)| format!("{name} = {}", quote(value)));
    let env = lines.collect::<Vec<_>>().join(
        "
",
    );
    format!(
        "[apps.{name}]\nroot = {root}\n\n[apps.{name}.env]\n{env}\n",
        name = example::APP,
        root = quote_path(&host.app()),
    )
}

fn app_tables(host: &Host, postgres: &Postgres, builder: &Builder) -> String {
    let app = host.app();
    format!(
        "{table}[services.{service}]\nargv = [\"venv/bin/python\", \"-m\", \"app\"]\ndir = {dir}\n\
         env_file = {env_file}\noutput = {output}\n\n\
         [postgres.{database}]\nhost = \"127.0.0.1\"\nport = {port}\nuser = \"employee_migrator\"\n\
         password = \"migrator_password\"\n",
        table = app_table(host, builder),
        service = example::SERVICE,
        dir = quote_path(&app.join("current/backend")),
        env_file = quote_path(&app.join("shared/.env")),
        output = quote_path(&host.root.join("log/service.out")),
        database = example::DATABASE,
        port = postgres.port,
    )
}

/// Has what is made in a directory lie in different parts of the disk, where the file system knows how
/// to: hosts have disks of their own. An ext4 without a journal looks, for each file it makes, at every
/// one that was removed in the same part within the last minutes.
fn spread(dir: &Path) {
    let Ok(dir) = fs::File::open(dir) else { return };
    if let Ok(flags) = ioctl_getflags(&dir) {
        // Others do without.
        let _ = ioctl_setflags(&dir, flags | IFlags::TOPDIR);
    }
}

/// The first three bytes of loopback addresses that nobody uses: clusters run side by side.
fn free_network() -> Result<String> {
    wait::until("free addresses of loopback", wait::SOON, || {
        let bytes = random::<2>().map_err(|error| error.to_string())?;
        let network = format!("127.{}.{}", 1 + bytes[0] % 250, bytes[1]);
        let free = (10..20).all(|host| {
            std::net::TcpListener::bind((format!("{network}.{host}").as_str(), example::PORT))
                .is_ok()
        });
        if free { Ok(network) } else { Err(network) }
    })
}

/// A word that stands nowhere else.
pub(crate) fn token() -> Result<String> {
    Ok(format!("{:016x}", u64::from_be_bytes(random()?)))
}

fn random<const N: usize>() -> Result<[u8; N]> {
    use std::io::Read as _;
    let mut bytes = [0; N];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
