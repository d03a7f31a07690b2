//! Who talks to which controller: a profile file, flags before it.
//!
//! ```toml
//! controller = "lockstep.example.com:7443"
//! ca = "ca-controllers.crt"     # the controllers' issuer; paths are relative to this file
//! cert = "operator-dora.crt"
//! key = "operator-dora.key"
//! fleet = "prod"                # the fleet that plans are compiled for, if hosts ask for seals
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::passphrase::Source;

/// The name of the file in a profile's directory.
const FILE: &str = "client.toml";

/// Flags that say where the controller is; each overrides the profile.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ProfileArgs {
    /// Profile: a file, or a directory with a `client.toml` [default: ~/.config/lockstep]
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        hide_env_values = true,
        env = "LOCKSTEP_PROFILE"
    )]
    pub(crate) profile: Option<PathBuf>,
    /// Address of the controller, `host:port`
    #[arg(
        long,
        global = true,
        value_name = "ADDRESS",
        hide_env_values = true,
        env = "LOCKSTEP_CONTROLLER"
    )]
    pub(crate) controller: Option<String>,
    /// Certificate of the controllers' issuer
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// Your certificate
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) cert: Option<PathBuf>,
    /// The key of your certificate
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) key: Option<PathBuf>,
    /// Read the key's passphrase from this descriptor; otherwise the terminal is asked
    #[arg(long, global = true, value_name = "NUMBER")]
    pub(crate) passphrase_fd: Option<u32>,
}

/// A profile without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Profile {
    /// `host:port`.
    pub(crate) controller: String,
    /// The name that the controller's certificate must have, if not that of the address.
    pub(crate) server_name: Option<String>,
    pub(crate) ca: PathBuf,
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
    /// Where the key's passphrase comes from, if it has one.
    pub(crate) passphrase: Source,
}

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProfileError {
    /// A file cannot be read.
    #[error("the profile {path} cannot be read")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file that is no profile.
    #[error("the profile {path} is not valid")]
    Invalid {
        /// Which.
        path: PathBuf,
        /// Where, and what is wrong.
        #[source]
        source: toml::de::Error,
    },
    /// Neither file nor flags say it.
    #[error("nothing says `{key}`: neither a flag nor the profile {path}")]
    Missing {
        /// What.
        key: &'static str,
        /// The file that was read.
        path: PathBuf,
    },
    /// There is no file, and flags do not say it either.
    #[error("nothing says `{key}`: there is no profile {path}, and no flag says it")]
    NoProfile {
        /// What.
        key: &'static str,
        /// The file that was looked for.
        path: PathBuf,
    },
    /// An address that nothing can dial.
    #[error("`{0}` is no address: `host:port` is expected, without a scheme")]
    Address(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProfile {
    controller: Option<String>,
    server_name: Option<String>,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    fleet: Option<String>,
}

impl ProfileArgs {
    /// The fleet that plans are compiled for, if the profile says it. One that nobody named may
    /// be absent.
    pub(crate) fn fleet(&self) -> Result<Option<String>, ProfileError> {
        let (_, raw) = RawProfile::read(self)?;
        Ok(raw.and_then(|raw| raw.fleet))
    }
}

impl RawProfile {
    /// The profile that flags, environment and home directory name, with its path; none if nobody
    /// named one and there is none.
    fn read(args: &ProfileArgs) -> Result<(PathBuf, Option<Self>), ProfileError> {
        let named = args.profile.clone();
        let path = match &named {
            Some(path) if path.is_dir() => path.join(FILE),
            Some(path) => path.clone(),
            None => default_file(),
        };
        let raw = match fs::read_to_string(&path) {
            Ok(text) => {
                toml::from_str(&text)
                    .map(Some)
                    .map_err(|source| ProfileError::Invalid {
                        path: path.clone(),
                        source,
                    })?
            }
            // A profile that nobody named may be absent, if flags say everything.
            Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(ProfileError::Unreadable { path, source }),
        };
        Ok((path, raw))
    }
}

impl Profile {
    /// Reads the profile that flags, environment and home directory name.
    pub(crate) fn load(args: &ProfileArgs) -> Result<Self, ProfileError> {
        let (path, raw) = RawProfile::read(args)?;
        Self::complete(args, raw, &path)
    }

    fn complete(
        args: &ProfileArgs,
        raw: Option<RawProfile>,
        path: &Path,
    ) -> Result<Self, ProfileError> {
        let is_there = raw.is_some();
        let missing = |key| {
            let path = path.to_owned();
            if is_there {
                ProfileError::Missing { key, path }
            } else {
                ProfileError::NoProfile { key, path }
            }
        };
        let base = path.parent().unwrap_or_else(|| Path::new("")).to_owned();
        let said = raw.unwrap_or_default();
        let file = |key, flag: &Option<PathBuf>, said: Option<PathBuf>| {
            let found = flag.clone().or_else(|| said.map(|path| base.join(path)));
            found.ok_or_else(|| missing(key))
        };
        let ca = file("ca", &args.ca, said.ca)?;
        let cert = file("cert", &args.cert, said.cert)?;
        let key = file("key", &args.key, said.key)?;
        let controller = args.controller.clone().or(said.controller);
        let controller = controller.ok_or_else(|| missing("controller"))?;
        let port = controller
            .rsplit_once(':')
            .map(|(_, port)| port.parse::<u16>());
        let is_url = controller.contains('/');
        if !matches!(port, Some(Ok(_))) || controller.starts_with(':') || is_url {
            return Err(ProfileError::Address(controller));
        }
        Ok(Self {
            controller,
            server_name: said.server_name,
            ca,
            cert,
            key,
            passphrase: Source::of(args.passphrase_fd),
        })
    }

    /// The name by which the controller is dialled, without port and brackets.
    pub(crate) fn host(&self) -> &str {
        let host = self
            .controller
            .rsplit_once(':')
            .map_or("", |(host, _)| host);
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        self.server_name.as_deref().unwrap_or(host)
    }
}

fn default_file() -> PathBuf {
    let config = std::env::var_os("XDG_CONFIG_HOME")
        .filter(|dir| !dir.is_empty())
        .map_or_else(
            || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".config"),
            PathBuf::from,
        );
    config.join("lockstep").join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "controller = \"[::1]:7443\"\nca = \"ca.crt\"\ncert = \"/c.crt\"\nkey = \"k\"";

    #[test]
    fn paths_are_relative_to_the_file_and_flags_win() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), TEXT).unwrap();
        let args = ProfileArgs {
            profile: Some(dir.path().to_owned()),
            key: Some("mine.key".into()),
            ..ProfileArgs::default()
        };
        let profile = Profile::load(&args).unwrap();
        assert_eq!(profile.ca, dir.path().join("ca.crt"));
        assert_eq!(profile.cert, Path::new("/c.crt"));
        assert_eq!(profile.key, Path::new("mine.key"));
        assert_eq!(profile.host(), "::1");
    }

    #[test]
    fn gaps_and_mistakes_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.toml");
        let load = |text: &str| {
            fs::write(&file, text).unwrap();
            let args = ProfileArgs {
                profile: Some(file.clone()),
                ..ProfileArgs::default()
            };
            Profile::load(&args).unwrap_err().to_string()
        };
        assert!(load(&TEXT.replace("key", "kee")).contains("is not valid"));
        assert!(load(&TEXT.replace("key = \"k\"", "")).contains("nothing says `key`"));
        assert!(load(&TEXT.replace(":7443", "")).contains("is no address"));
        assert!(load(&TEXT.replace("[::1]", "https://x")).contains("without a scheme"));
        let absent = ProfileArgs {
            profile: Some(dir.path().join("no")),
            ..ProfileArgs::default()
        };
        assert!(matches!(
            Profile::load(&absent),
            Err(ProfileError::Unreadable { .. })
        ));
        let nothing =
            Profile::complete(&ProfileArgs::default(), None, Path::new("/no/client.toml"));
        let nothing = nothing.unwrap_err().to_string();
        assert!(
            nothing.contains("there is no profile /no/client.toml"),
            "{nothing}"
        );
    }
}
