//! `lockstep validate`, `schema` and `actions`: the plan language, without a controller. Also how
//! every command reads and compiles a plan file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use lockstep_core::compile::compile;
use lockstep_core::plan::{Findings, Plan};
use lockstep_proto::action::{CATALOGUE, Class, Site};
use lockstep_proto::plan::{CompiledPlan, check_fleet_name};
use lockstep_proto::seal::{self, SealedPlan};
use lockstep_proto::values::Timestamp;
use serde_json::json;

use super::error::CliError;
use super::exit::Exit;
use super::printer::Printer;
use super::profile::ProfileArgs;
use super::render::{Line, table};

/// A plan file, and the values of its inputs.
#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    /// The plan file, or what `lockstep compile` made of it
    pub(crate) plan: PathBuf,
    /// The fleet that the plan is for, where hosts ask for sealed plans [default: the profile's]
    #[arg(long, value_name = "NAME")]
    pub(crate) fleet: Option<String>,
    /// A value for one of the plan's inputs
    #[arg(short, long = "input", value_name = "NAME=VALUE", value_parser = parse_input)]
    pub(crate) inputs: Vec<(String, String)>,
}

impl PlanArgs {
    /// The inputs' values by name. Of two for one input, none can be meant.
    fn given(&self) -> Result<BTreeMap<String, String>, CliError> {
        let mut given = BTreeMap::new();
        for (name, value) in &self.inputs {
            if given.insert(name.clone(), value.clone()).is_some() {
                return Err(CliError::usage(
                    format!("the input `{name}` is given twice"),
                    format!("give it once: --input {name}=VALUE"),
                ));
            }
        }
        Ok(given)
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Validate {
    #[command(flatten)]
    plan: PlanArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Actions {
    /// Print the whole reference, with arguments, as Markdown
    #[arg(long)]
    markdown: bool,
}

/// `lockstep validate`. As long as an input has neither a value nor a default, what depends on
/// values is not looked at.
pub(crate) fn validate(arguments: &Validate, printer: Printer) -> Result<Exit, CliError> {
    let given = arguments.plan.given()?;
    let (plan, _) = read(&arguments.plan.plan)?;
    if plan.is_err() && !given.is_empty() {
        printer.say("the values of --input are looked at once the plan itself is valid");
    }
    let result = plan.and_then(|plan| {
        let warnings = plan.warnings().clone();
        let inputs = plan.inputs().iter();
        let missing: Vec<String> = inputs
            .filter(|input| input.default.is_none() && !given.contains_key(&input.name))
            .map(|input| input.name.clone())
            .collect();
        if missing.is_empty() || !given.is_empty() {
            compile_now(&plan, &given)?;
        }
        Ok((plan, warnings, missing))
    });
    if printer.is_json() {
        let findings = match &result {
            Ok((_, warnings, _)) => warnings,
            Err(findings) => findings,
        };
        let mut document = findings.to_json();
        document["format"] = json!("lockstep.findings/1");
        printer.json(&document)?;
        return Ok(if result.is_ok() {
            Exit::Done
        } else {
            Exit::Usage
        });
    }
    match result {
        Err(findings) => Err(CliError::Plan(Box::new(findings))),
        Ok((plan, warnings, missing)) => {
            if !warnings.is_empty() {
                printer.say(warnings.to_string());
            }
            let mut said = format!("{} is valid", plan.name());
            if !missing.is_empty() {
                said = format!(
                    "{said}, as far as one can tell without values for {} (--input NAME=VALUE)",
                    missing.join(", ")
                );
            }
            printer.lines(&[Line::plain(said)])?;
            Ok(Exit::Done)
        }
    }
}

/// `lockstep schema`.
pub(crate) fn schema(printer: Printer) -> Result<Exit, CliError> {
    printer.json(&lockstep_core::schema::schema())?;
    Ok(Exit::Done)
}

/// `lockstep actions`.
pub(crate) fn actions(arguments: &Actions, printer: Printer) -> Result<Exit, CliError> {
    if arguments.markdown {
        printer.text(&lockstep_core::schema::catalogue_markdown())?;
    } else if printer.is_json() {
        printer.json(&json!({"format": "lockstep.actions/1", "actions": CATALOGUE}))?;
    } else {
        let rows: Vec<Vec<String>> = CATALOGUE
            .iter()
            .map(|row| {
                let site = match row.site {
                    Site::Host => "hosts",
                    Site::Controller => "controller",
                };
                let undo = if row.undo { "yes" } else { "-" };
                let crash = match row.class {
                    Class::Observing => "asked again",
                    Class::Convergent | Class::Receipted => "settled by probe",
                    Class::Blind => "a person decides",
                };
                vec![
                    row.name.into(),
                    site.into(),
                    undo.into(),
                    crash.into(),
                    row.summary.into(),
                ]
            })
            .collect();
        printer.lines(&table(
            &["ACTION", "ON", "UNDO", "AFTER A CRASH", "WHAT IT DOES"],
            &rows,
        ))?;
    }
    Ok(Exit::Done)
}

/// Reads a plan file: the plan or its findings, and the text.
pub(crate) fn read(path: &Path) -> Result<(Result<Plan, Findings>, String), CliError> {
    let text = fs::read(path).map_err(|source| CliError::File {
        path: path.to_owned(),
        verb: "read",
        source,
    })?;
    let text = String::from_utf8(text).map_err(|_| {
        CliError::usage(
            format!("{} is not UTF-8", path.display()),
            "a plan file is YAML in UTF-8",
        )
    })?;
    Ok((Plan::parse(&path.display().to_string(), &text), text))
}

/// A plan that is ready to be submitted.
pub(crate) struct Submission {
    pub(crate) sealed: SealedPlan,
    /// The plan file's text, for the report; empty for one that was compiled before.
    pub(crate) source: String,
    /// Armoured.
    pub(crate) signatures: Vec<String>,
}

/// Reads and compiles a plan file for a submission, or reads what was compiled and signed before.
pub(crate) fn compiled(
    arguments: &PlanArgs,
    profile: &ProfileArgs,
    printer: Printer,
) -> Result<Submission, CliError> {
    let given = arguments.given()?;
    let path = &arguments.plan;
    if let Some(bytes) = fs::read(path).ok().filter(|bytes| is_compiled(bytes)) {
        if !given.is_empty() || arguments.fleet.is_some() {
            return Err(CliError::usage(
                format!("{} is compiled already", path.display()),
                "give inputs and fleet to `lockstep compile`",
            ));
        }
        return Ok(Submission {
            sealed: open(path, &bytes)?,
            source: String::new(),
            signatures: super::seal::signatures_of(path)?,
        });
    }
    let (plan, source) = read(path)?;
    let refused = |findings| CliError::Plan(Box::new(findings));
    let plan = plan.map_err(refused)?;
    if !plan.warnings().is_empty() {
        printer.say(plan.warnings().to_string());
    }
    let sealed = compile_now(&plan, &given).map_err(refused)?;
    let fleet = fleet_name(arguments.fleet.as_ref(), profile)?;
    Ok(Submission {
        sealed: for_fleet(sealed, fleet)?,
        source,
        signatures: vec![],
    })
}

/// Whether a file holds a compiled plan: its canonical form begins with its format.
pub(crate) fn is_compiled(bytes: &[u8]) -> bool {
    bytes.starts_with(b"{\"format\":")
}

/// Reads a compiled plan.
pub(crate) fn open(path: &Path, bytes: &[u8]) -> Result<SealedPlan, CliError> {
    seal::open(bytes).map_err(|error| {
        let cause = std::error::Error::source(&error);
        let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
        CliError::usage(
            format!("{} cannot be used: {error}{cause}", path.display()),
            "compile the plan again",
        )
    })
}

/// The fleet that flags or the profile name; empty if neither does.
pub(crate) fn fleet_name(flag: Option<&String>, profile: &ProfileArgs) -> Result<String, CliError> {
    let name = match flag {
        Some(name) => Some(name.clone()),
        None => profile.fleet()?,
    };
    let name = name.unwrap_or_default();
    if !name.is_empty() {
        check_fleet_name(&name)
            .map_err(|why| CliError::usage(why, "look at --fleet, and `fleet` in the profile"))?;
    }
    Ok(name)
}

fn for_fleet(sealed: SealedPlan, fleet_name: String) -> Result<SealedPlan, CliError> {
    if fleet_name.is_empty() {
        return Ok(sealed);
    }
    let plan = CompiledPlan {
        fleet_name,
        ..sealed.plan().clone()
    };
    seal::seal(plan).map_err(|error| CliError::usage(error.to_string(), "split the plan"))
}

fn compile_now(plan: &Plan, given: &BTreeMap<String, String>) -> Result<SealedPlan, Findings> {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    // A serial licenses one rollout, for ever; nobody compiles twice in a nanosecond.
    let serial = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
    let now = Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
    compile(plan, given, serial, now)
}

fn parse_input(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}
