//! What an approver signs. A controller may be in the wrong hands: what it shows is held against
//! what was typed, against digests, and against the approver's own copies.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use lockstep_proto::action::Action;
use lockstep_proto::approval::{self, Approval};
use lockstep_proto::ids::{Digest, HostId, RolloutId, StepRef};
use lockstep_proto::order::{self, Fact};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::sshsig;
use lockstep_proto::values::{Period, Timestamp};

use super::{Kind, facts_before, place};
use crate::cli::document::{Document, Gate, Step};
use crate::cli::error::CliError;
use crate::cli::{clean, plan, seal};

/// What the approver has without the controller.
#[derive(Default)]
pub(in crate::cli) struct Own {
    /// The compiled plan.
    pub(in crate::cli) plan: Option<Box<SealedPlan>>,
    /// Digests of SQL.
    sql: BTreeSet<Digest>,
}

impl Own {
    /// Reads the files that were named.
    pub(in crate::cli) fn read(plan: Option<&Path>, sql: &[PathBuf]) -> Result<Self, CliError> {
        let read = |path: &Path| {
            fs::read(path).map_err(|source| CliError::File {
                path: path.to_owned(),
                verb: "read",
                source,
            })
        };
        let open = |path: &Path| plan::open(path, &read(path)?).map(Box::new);
        let mut own = Self {
            plan: plan.map(open).transpose()?,
            sql: BTreeSet::new(),
        };
        for path in sql {
            // As a host digests what its tool printed.
            let text = order::normal_sql(&String::from_utf8_lossy(&read(path)?));
            own.sql.insert(Digest::of(text.as_bytes()));
        }
        Ok(own)
    }

    pub(in crate::cli) fn has_sql(&self, shown: &Fact) -> bool {
        self.sql.iter().any(|sql| shown.is_of_sql(*sql))
    }

    /// The rollout runs the approver's plan, and what is said of it is what stands in it.
    pub(in crate::cli) fn check_plan(
        &self,
        document: &Document,
        step: &Step,
    ) -> Result<(), CliError> {
        let Some(own) = &self.plan else {
            return Ok(());
        };
        let differs = |what: String| {
            Err(CliError::usage(
                format!("{what}; nothing was decided"),
                "find out which plan the rollout runs: it is not the one of --plan as shown",
            ))
        };
        if document.digest != own.digest().to_string() {
            return differs(format!(
                "{} runs {}, and your plan is {}",
                document.rollout,
                document.digest,
                own.digest()
            ));
        }
        let plan = own.plan();
        let inputs = plan.inputs.iter();
        let inputs: BTreeMap<String, String> = inputs
            .map(|(name, value)| (clean::line(name), clean::lines(value)))
            .collect();
        if document.plan != clean::lines(&plan.plan) || document.inputs != inputs {
            return differs("the name or the inputs shown are not those of your plan".to_owned());
        }
        let action = place(&step.at).and_then(|at| Some(&plan.step(at)?.step.action));
        let title = |action: &Action| match action {
            Action::GateApproval(own) => own.title.as_deref().map(clean::lines),
            _ => None,
        };
        match action {
            Some(own)
                if own.name() == step.action
                    && title(own).as_deref() == step.args["title"].as_str() =>
            {
                Ok(())
            }
            _ => differs(format!("gate {} is not as in your plan", step.at)),
        }
    }
}

/// What people see before they sign.
pub(in crate::cli) struct Shown<'a> {
    pub(in crate::cli) document: &'a Document,
    pub(in crate::cli) step: &'a Step,
    pub(in crate::cli) gate: &'a Gate,
    pub(in crate::cli) own: &'a Own,
}

impl Shown<'_> {
    /// Signs what was shown. What is signed is made from the very document that was shown, so that
    /// a controller cannot have something else signed than what people read.
    pub(in crate::cli) fn sign(
        &self,
        kind: Kind,
        approver: &str,
        (key, good_for): (&Path, Period),
    ) -> Result<(Timestamp, String), CliError> {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let now = Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        let expires = now.plus(good_for);
        let Kind {
            statement,
            namespace,
        } = kind;
        let statement = self.statement(statement, approver, expires)?;
        let signature = seal::ssh_sign(key, namespace, &statement)?;
        sshsig::verify(signature.as_bytes(), namespace, &statement).map_err(|error| {
            CliError::usage(
                format!(
                    "what ssh-keygen made with {} cannot be used: {error}",
                    key.display()
                ),
                "use a key made with `ssh-keygen -t ed25519` or `-t ed25519-sk`",
            )
        })?;
        Ok((expires, signature))
    }

    /// The bytes to be signed; refused if what was shown does not bear them out.
    fn statement(
        &self,
        statement: &'static str,
        approver: &str,
        expires: Timestamp,
    ) -> Result<Vec<u8>, CliError> {
        let document = self.document;
        let unreadable = |what: &str| {
            CliError::usage(
                format!("the controller's document names no {what} that could be signed"),
                "look at it: lockstep status --output json",
            )
        };
        let rollout: RolloutId = document
            .rollout
            .parse()
            .map_err(|_| unreadable("rollout"))?;
        let plan: Digest = document.digest.parse().map_err(|_| unreadable("plan"))?;
        let evidence: Digest = self
            .gate
            .evidence
            .parse()
            .map_err(|_| unreadable("evidence"))?;
        let at = place(&self.step.at).ok_or_else(|| unreadable("gate"))?;
        let hosts = document.hosts.iter().map(|host| host.host.parse());
        let hosts: Result<Vec<HostId>, _> = hosts.collect();
        let hosts = hosts.map_err(|_| unreadable("hosts"))?;
        let sql = self.sql(at)?;
        if approval::evidence(plan, &hosts, &sql) != evidence {
            return Err(CliError::usage(
                "what the controller shows is not what is to be decided upon",
                "approve nothing: find out what is wrong with the controller",
            ));
        }
        let statement = Approval {
            statement,
            rollout: &rollout,
            plan,
            hosts: &hosts,
            gate: at,
            evidence,
            requester: &document.requester,
            approver,
            expires,
        };
        Ok(statement.encode())
    }

    /// The digests of the SQL that was shown, each of a text that people could read.
    fn sql(&self, gate: StepRef) -> Result<Vec<Digest>, CliError> {
        let mut digests = Vec::new();
        for fact in facts_before(self.document, gate) {
            let Fact::SqlPlan {
                database,
                digest,
                sql,
                ..
            } = &fact
            else {
                continue;
            };
            if !fact.is_of_sql(Digest::of(sql.as_bytes())) && !self.own.has_sql(&fact) {
                return Err(CliError::usage(
                    format!(
                        "the SQL shown for {} does not have the digest {digest}: it was \
                         shortened, or it is false; nothing was signed",
                        clean::line(database)
                    ),
                    "print it with the migration tool (alembic upgrade FROM:TO --sql), read it, \
                     and name the file with --sql FILE",
                ));
            }
            digests.push(*digest);
        }
        Ok(digests)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// The fixture as an honest controller would say it, with this SQL under this digest.
    fn waiting(sql: &str, digest: Digest) -> Document {
        let text = include_str!("../render/fixtures/waiting.json");
        let mut value: serde_json::Value = serde_json::from_str(text).unwrap();
        let plan = Digest::of(b"plan");
        value["digest"] = plan.to_string().into();
        let hosts: Vec<HostId> = ["app-1", "db-1"].map(|host| host.parse().unwrap()).into();
        let evidence = approval::evidence(plan, &hosts, &[digest]);
        let list = |value: &mut serde_json::Value| match value {
            serde_json::Value::Array(items) => std::mem::take(items),
            _ => vec![],
        };
        let mut phases = list(&mut value["phases"]);
        for phase in &mut phases {
            let mut steps = list(&mut phase["steps"]);
            for step in &mut steps {
                if step["gate"]["evidence"].is_string() {
                    step["gate"]["evidence"] = evidence.to_string().into();
                }
                let facts = step.pointer_mut("/attempts/0/facts/0");
                if let Some(fact) = facts.filter(|fact| fact["kind"] == "sql_plan") {
                    fact["sql"] = sql.into();
                    fact["digest"] = digest.to_string().into();
                }
            }
            phase["steps"] = steps.into();
        }
        value["phases"] = phases.into();
        Document::read(value.to_string().as_bytes()).unwrap()
    }

    fn statement(document: &Document, own: &Own) -> Result<Vec<u8>, CliError> {
        let (step, gate) = document.open_gates().next().unwrap();
        let shown = Shown {
            document,
            step,
            gate,
            own,
        };
        shown.statement(approval::STATEMENT, "bob", Timestamp(1))
    }

    #[test]
    fn sql_that_does_not_have_its_digest_is_not_signed() {
        let long = "ALTER TABLE a;  \n\nALTER TABLE b;\n";
        let digest = Digest::of(b"ALTER TABLE a;\nALTER TABLE b;\n");
        let whole = waiting("ALTER TABLE a;\nALTER TABLE b;\n", digest);
        statement(&whole, &Own::default()).unwrap();
        let document = waiting("ALTER TABLE a;\n", digest);
        let error = statement(&document, &Own::default()).unwrap_err();
        assert!(error.to_string().contains("nothing was signed"), "{error}");
        // The whole of it in a file of one's own, as the tool prints it.
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(long.as_bytes()).unwrap();
        let own = Own::read(None, &[file.path().to_owned()]).unwrap();
        statement(&document, &own).unwrap();
        let other = waiting("ALTER TABLE a;\n", Digest::of(b"DROP TABLE a;\n"));
        assert!(statement(&other, &own).is_err());
    }

    #[test]
    fn another_plan_than_the_approvers_own_is_refused() {
        let text = serde_json::json!({
            "format": 1, "plan": "employee-system", "serial": 1, "not_before": 0, "expires": 9,
            "deadline": "1h", "inputs": {"release": "v1.1.0"}, "fleet": {},
            "phases": [
                {"name": "one", "stages": [{"target": "controller", "steps": [
                    {"action": {"gate.wait": {"for": "1m"}}, "timeout": "2m", "line": 1}]}]},
                {"name": "approve", "stages": [{"target": "controller", "steps": [
                    {"action": {"gate.wait": {"for": "1m"}}, "timeout": "2m", "line": 1},
                    {"action": {"gate.approval": {"from": {"dba": 1}, "timeout": "1h",
                      "on_timeout": "abort"}}, "timeout": "2m", "line": 1}]}]},
            ],
            "slo": {},
        });
        let compiled = serde_json::from_value(text).unwrap();
        let sealed = lockstep_proto::seal::seal(compiled).unwrap();
        let mut document = waiting("", Digest::of(b""));
        document.digest = sealed.digest().to_string();
        let own = Own {
            plan: Some(Box::new(sealed)),
            sql: BTreeSet::new(),
        };
        let check = |document: &Document| {
            let (step, _) = document.open_gates().next().unwrap();
            own.check_plan(document, step)
        };
        check(&document).unwrap();
        let mut other = document.clone();
        other.digest = Digest::of(b"another").to_string();
        assert!(check(&other).unwrap_err().to_string().contains("your plan"));
        let mut other = document.clone();
        other.plan = "harmless".to_owned();
        assert!(check(&other).unwrap_err().to_string().contains("name or"));
        let mut other = document;
        let step = &mut other.phases[1].steps[1];
        step.at = "1.0".to_owned();
        assert!(check(&other).unwrap_err().to_string().contains("gate 1.0"));
    }
}
