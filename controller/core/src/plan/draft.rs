//! A plan as far as it could be read: every value typed, with its place, and `None` where the
//! file has a mistake, so that the checks that follow say nothing about it.

use lockstep_proto::action::{Action, ActionInfo, CATALOGUE, Site};
use lockstep_proto::plan::{NoticeWhen, Undo};
use lockstep_proto::values::Period;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;

use super::de::is_null;
use super::finding::{Code, list, nearest};
use super::node::{Kind, NodeId};
use super::raw::{
    At, Place, RawAfterRollback, RawFence, RawPhase, RawPlan, RawPlanned, RawStrategy,
};
use super::reader::Reader;
use super::words;
use crate::schema;

/// The keys of a step that are not its action.
const STEP_KEYS: [&str; 4] = ["name", "on", "timeout", "undo"];

/// Everything that a plan file says.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(crate) raw: RawPlan,
    pub(crate) window: Option<(NodeId, Action)>,
    pub(crate) phases: Vec<DraftPhase>,
    pub(crate) after_rollback: Option<DraftPhase>,
    pub(crate) notices: Vec<DraftNotice>,
}

/// A phase, or the checks after a rollback.
#[derive(Debug)]
pub(crate) struct DraftPhase {
    pub(crate) node: NodeId,
    pub(crate) name: Option<At<String>>,
    pub(crate) on: Option<On>,
    /// Something stands under `on`, readable or not.
    pub(crate) has_on: bool,
    pub(crate) strategy: Option<At<RawStrategy>>,
    pub(crate) steps: Vec<DraftStep>,
    pub(crate) fence: Option<DraftFence>,
    pub(crate) deadline: Option<At<Period>>,
    pub(crate) planned: Option<RawPlanned>,
}

/// A fence with the hosts that it names.
#[derive(Debug)]
pub(crate) struct DraftFence {
    pub(crate) node: NodeId,
    pub(crate) raw: RawFence,
    pub(crate) on: Option<On>,
}

/// Hosts: `on: app`, `on: [app, db]`, `on: {one_of: app}`.
#[derive(Debug, Clone)]
pub(crate) struct On {
    pub(crate) one_of: bool,
    pub(crate) groups: Vec<At<String>>,
}

/// A step. Its action's name is known even where its arguments are not.
#[derive(Debug)]
pub(crate) struct DraftStep {
    pub(crate) node: NodeId,
    /// The node of the action's arguments.
    pub(crate) args: NodeId,
    pub(crate) info: &'static ActionInfo,
    pub(crate) action: Option<Action>,
    pub(crate) on: Option<On>,
    /// The node of `on`, readable or not.
    pub(crate) on_node: Option<NodeId>,
    pub(crate) name: Option<String>,
    pub(crate) timeout: Option<At<Period>>,
    pub(crate) undo: Option<At<Undo>>,
}

/// A notice.
#[derive(Debug)]
pub(crate) struct DraftNotice {
    pub(crate) args: NodeId,
    pub(crate) when: Option<NoticeWhen>,
    pub(crate) action: Option<Action>,
}

/// Reads a plan; `None` if the file is no mapping at all.
pub(crate) fn read(reader: &Reader<'_>) -> Option<Draft> {
    let mut raw: RawPlan = reader.read(reader.tree.root)?;
    let phases = raw
        .phases
        .as_mut()
        .map(|phases| std::mem::take(&mut phases.value));
    let phases = phases.unwrap_or_default().into_iter();
    let after_rollback = raw.after_rollback.take();
    let notices = raw.notices.take().unwrap_or_default();
    Some(Draft {
        window: raw.window.as_ref().and_then(|window| {
            let action = read_args(reader, "gate.window", window.node)?;
            Some((window.node, action))
        }),
        phases: phases.map(|phase| read_phase(reader, phase)).collect(),
        after_rollback: after_rollback.map(|phase| read_after_rollback(reader, phase)),
        notices: notices
            .into_iter()
            .filter_map(|notice| read_notice(reader, notice.node))
            .collect(),
        raw,
    })
}

fn read_phase(reader: &Reader<'_>, phase: At<RawPhase>) -> DraftPhase {
    let At { node, value: raw } = phase;
    DraftPhase {
        node,
        name: raw.name,
        has_on: raw.on.is_some(),
        on: raw.on.and_then(|on| read_on(reader, on.node)),
        strategy: raw.strategy,
        steps: read_steps(reader, raw.steps),
        fence: raw.fence.map(|At { node, mut value }| DraftFence {
            node,
            on: value.on.take().and_then(|on| read_on(reader, on.node)),
            raw: value,
        }),
        deadline: raw.deadline,
        planned: raw.planned,
    }
}

fn read_after_rollback(reader: &Reader<'_>, phase: At<RawAfterRollback>) -> DraftPhase {
    let At { node, value: raw } = phase;
    DraftPhase {
        node,
        name: None,
        has_on: raw.on.is_some(),
        on: raw.on.and_then(|on| read_on(reader, on.node)),
        strategy: None,
        steps: read_steps(reader, raw.steps),
        fence: None,
        deadline: raw.deadline,
        planned: None,
    }
}

fn read_steps(reader: &Reader<'_>, steps: Option<At<Vec<Place<StepShape>>>>) -> Vec<DraftStep> {
    let steps = steps.map(|steps| steps.value).unwrap_or_default();
    let nodes = steps.into_iter().map(|step| step.node);
    nodes.filter_map(|node| read_step(reader, node)).collect()
}

fn read_step(reader: &Reader<'_>, node: NodeId) -> Option<DraftStep> {
    let tree = reader.tree;
    match &tree.node(node).kind {
        Kind::Mapping(_) => {}
        Kind::Broken => return None,
        Kind::Scalar(scalar) if CATALOGUE.iter().any(|row| row.name == scalar.text) => {
            let message = format!("`{}` stands here without its arguments", scalar.text);
            let hint = format!("write `{}: {{...}}`", scalar.text);
            reader.report(Code::WrongValue, node, message, Some(hint));
            return None;
        }
        Kind::Scalar(_) | Kind::Sequence(_) => {
            let message = "a step is a mapping with its action as key";
            let hint = "such as `- check.disk: {path: /var, free: 10GiB}`".to_owned();
            reader.report(Code::WrongValue, node, message, Some(hint));
            return None;
        }
    }
    let (info, args) = the_action(reader, node, &STEP_KEYS, |_| true)?;
    let on_beside = tree.get(node, "on");
    let on_inside = tree.get(args, "on");
    if let (Some(_), Some(inside)) = (on_beside, on_inside) {
        let message = "`on` stands both beside the action and in its arguments";
        reader.report(
            Code::DuplicateKey,
            inside,
            message,
            Some("keep one of them".to_owned()),
        );
    }
    reader.set_aside(args, "on");
    let on_node = on_beside.or(on_inside);
    Some(DraftStep {
        node,
        args,
        info,
        action: read_args(reader, info.name, args),
        on: on_node.and_then(|on| read_on(reader, on)),
        on_node,
        name: tree.get(node, "name").and_then(|name| reader.read(name)),
        timeout: tree
            .get(node, "timeout")
            .and_then(|timeout| reader.read(timeout)),
        undo: tree.get(node, "undo").and_then(|undo| reader.read(undo)),
    })
}

/// Finds the one key of a mapping that names an action, and reports everything else in it.
fn the_action(
    reader: &Reader<'_>,
    node: NodeId,
    keys: &[&str],
    allowed: impl Fn(&str) -> bool,
) -> Option<(&'static ActionInfo, NodeId)> {
    let tree = reader.tree;
    let names: Vec<&str> = CATALOGUE
        .iter()
        .map(|row| row.name)
        .filter(|n| allowed(n))
        .collect();
    let mut found: Option<(&'static ActionInfo, NodeId)> = None;
    let mut complained = false;
    for (key, value) in tree.entries(node) {
        let name = tree.text(*key);
        if keys.contains(&name) || name.starts_with("x-") {
            continue;
        }
        let row = CATALOGUE
            .iter()
            .find(|row| row.name == name && allowed(name));
        match (row, &found) {
            (Some(row), None) => found = Some((row, *value)),
            (Some(_), Some((first, _))) => {
                let message = format!("a second action, `{name}`, in the step of `{}`", first.name);
                let hint = format!("give it a step of its own: `- {name}: ...`");
                reader.report(Code::OneAction, *key, message, Some(hint));
            }
            (None, _) if words::ACTIONS_FOR_LATER.contains(&name) => {
                complained = true;
                let message = format!("the action `{name}` is not in this version");
                let hint = "until it is, use `exec.run`, or `gate.checklist` for people".to_owned();
                reader.report(Code::NotInThisVersion, *key, message, Some(hint));
            }
            (None, _) if name.contains('.') => {
                complained = true;
                let hint = nearest(name, names.iter().copied())
                    .map(|near| format!("did you mean `{near}`?"))
                    .or_else(|| family_of(name, &names));
                let message = format!("there is no action `{name}` here");
                reader.report(Code::UnknownAction, *key, message, hint);
            }
            (None, _) => {
                let near = nearest(name, names.iter().chain(keys).copied());
                complained |= near.is_none_or(|near| near.contains('.'));
                match near {
                    Some(near) => reader.report_unknown_key(*key, &[near]),
                    None => reader.report_unknown_key(*key, keys),
                }
            }
        }
    }
    if found.is_none() && !complained {
        let message = "a step needs an action";
        let hint = "such as `check.disk: {path: /var, free: 10GiB}`".to_owned();
        reader.report(Code::OneAction, node, message, Some(hint));
    }
    found
}

/// The actions of the family that a wrong name begins with.
fn family_of(name: &str, names: &[&str]) -> Option<String> {
    let (family, _) = name.split_once('.')?;
    let of_family = |known: &&&str| known.split_once('.').is_some_and(|(f, _)| f == family);
    let members: Vec<&str> = names.iter().filter(of_family).copied().collect();
    (!members.is_empty()).then(|| format!("the family has {}", list(&members, "and")))
}

/// Reads the arguments of an action. `on` may stand among them, and belongs to the step.
fn read_args(reader: &Reader<'_>, name: &'static str, args: NodeId) -> Option<Action> {
    if let Kind::Scalar(scalar) = &reader.tree.node(args).kind {
        let given = if is_null(scalar) {
            "nothing".to_owned()
        } else {
            format!("`{}`", scalar.text)
        };
        let message = format!("`{name}` takes a mapping of arguments, found {given}");
        let known = list(&schema::arguments(name), "and");
        let hint = format!("its arguments are {known}");
        reader.report(Code::WrongValue, args, message, Some(hint));
        return None;
    }
    reader.read_with(args, |de| {
        Action::deserialize_args(name, de).expect("the name comes from the catalogue")
    })
}

/// Reads `app`, `[app, db]` or `{one_of: app}`.
fn read_on(reader: &Reader<'_>, node: NodeId) -> Option<On> {
    let tree = reader.tree;
    let (one_of, holder) = match &tree.node(node).kind {
        Kind::Mapping(entries) => {
            let Some(groups) = tree.get(node, "one_of") else {
                let message = "`on` names groups: `app`, `[app, db]` or `{one_of: app}`";
                reader.report(Code::WrongValue, node, message, None);
                return None;
            };
            for (key, _) in entries {
                let name = tree.text(*key);
                if name != "one_of" && !name.starts_with("x-") {
                    reader.report_unknown_key(*key, &["one_of"]);
                }
            }
            (true, groups)
        }
        _ => (false, node),
    };
    let groups = match &tree.node(holder).kind {
        Kind::Sequence(_) => reader.read::<Vec<At<String>>>(holder)?,
        _ => vec![reader.read::<At<String>>(holder)?],
    };
    if groups.is_empty() {
        let message = "`on` names no group";
        reader.report(Code::NothingAsked, holder, message, None);
        return None;
    }
    Some(On { one_of, groups })
}

fn read_notice(reader: &Reader<'_>, node: NodeId) -> Option<DraftNotice> {
    let tree = reader.tree;
    if !matches!(tree.node(node).kind, Kind::Mapping(_)) {
        let message = "a notice is a mapping with `when` and a `notify` action";
        reader.report(Code::WrongValue, node, message, None);
        return None;
    }
    let is_notice = |name: &str| name.starts_with("notify.");
    let (info, args) = the_action(reader, node, &["when"], is_notice)?;
    let when = tree.get(node, "when");
    if when.is_none() {
        reader.report(Code::MissingKey, node, "this notice lacks `when`", None);
    }
    Some(DraftNotice {
        args,
        when: when.and_then(|when| read_when(reader, when)),
        action: read_args(reader, info.name, args),
    })
}

fn read_when(reader: &Reader<'_>, node: NodeId) -> Option<NoticeWhen> {
    reader.read_with(node, |de| NoticeWhen::deserialize(de))
}

impl DraftStep {
    /// Whether the step runs on the controller.
    pub(crate) fn is_controllers(&self) -> bool {
        self.info.site == Site::Controller
    }
}

/// What may stand under `on`, for the schema.
#[derive(Debug)]
pub(crate) struct OnShape;

impl JsonSchema for OnShape {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "On".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let groups = serde_json::json!({"anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1},
        ]});
        json_schema!({
            "description": "A group, a list of groups, or one elected host of them.",
            "anyOf": [groups["anyOf"][0], groups["anyOf"][1], {
                "type": "object",
                "properties": {"one_of": groups},
                "patternProperties": {"^x-": true},
                "required": ["one_of"],
                "additionalProperties": false,
            }],
        })
    }
}

/// A step, for the schema: its own keys, and exactly one action.
#[derive(Debug)]
pub(crate) struct StepShape;

impl JsonSchema for StepShape {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Step".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut properties = serde_json::Map::new();
        let mut choices = Vec::new();
        for (name, args) in Action::schemas(generator) {
            let row = CATALOGUE.iter().find(|row| row.name == name);
            let summary = row.map_or("", |row| row.summary);
            let value = serde_json::json!({"description": summary, "allOf": [args]});
            properties.insert(name.to_owned(), value);
            choices.push(serde_json::json!({"required": [name]}));
        }
        let own = serde_json::json!({
            "name": {"type": "string", "description": "What it is, for people."},
            "on": generator.subschema_for::<OnShape>(),
            "timeout": generator.subschema_for::<Period>(),
            "undo": {
                "enum": ["auto", "keep"],
                "description": "What a rollback does with it. Default: auto.",
            },
        });
        properties.extend(own.as_object().cloned().unwrap_or_default());
        json_schema!({
            "type": "object",
            "properties": properties,
            "patternProperties": {"^x-": true},
            "additionalProperties": false,
            "oneOf": choices,
        })
    }
}

/// A notice, for the schema.
#[derive(Debug)]
pub(crate) struct NoticeShape;

impl JsonSchema for NoticeShape {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Notice".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let every = generator.subschema_for::<Period>();
        let mut properties = serde_json::Map::new();
        let mut choices = Vec::new();
        let schemas = Action::schemas(generator);
        for (name, args) in schemas
            .into_iter()
            .filter(|(name, _)| name.starts_with("notify."))
        {
            properties.insert(name.to_owned(), args.into());
            choices.push(serde_json::json!({"required": [name]}));
        }
        let when = serde_json::json!({
            "description": "When it is sent.",
            "anyOf": [
                {"enum": [
                    "started", "waiting", "rolling_back", "succeeded", "rolled_back", "halted",
                ]},
                {
                    "type": "object",
                    "properties": {"every": every},
                    "required": ["every"],
                    "additionalProperties": false,
                },
            ],
        });
        properties.insert("when".to_owned(), when);
        json_schema!({
            "type": "object",
            "properties": properties,
            "patternProperties": {"^x-": true},
            "required": ["when"],
            "additionalProperties": false,
            "oneOf": choices,
        })
    }
}
