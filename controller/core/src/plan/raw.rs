//! The shape of a plan file, as serde and JSON Schema see it. What a step is stands in
//! [`super::draft`]: its one key is the action's name.

use std::fmt;
use std::marker::PhantomData;

use lockstep_proto::action::postgres::FenceVia;
use lockstep_proto::plan::Batch;
use lockstep_proto::values::Period;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::de::PLACED;
use super::node::NodeId;

/// A value with its place in the file.
#[derive(Debug, Clone)]
pub(crate) struct At<T> {
    pub(crate) node: NodeId,
    pub(crate) value: T,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for At<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pair<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Pair<T> {
            type Value = At<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value with its place")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<At<T>, A::Error> {
                let node = NodeId(
                    pair.next_element()?
                        .ok_or_else(|| A::Error::custom("no place"))?,
                );
                let value = pair
                    .next_element()?
                    .ok_or_else(|| A::Error::custom("no value"))?;
                Ok(At { node, value })
            }
        }
        deserializer.deserialize_tuple_struct(PLACED, 2, Pair(PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for At<T> {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> std::borrow::Cow<'static, str> {
        T::schema_name()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        generator.subschema_for::<T>()
    }
}

/// The place of a value that is read by hand; `S` is its shape, for the schema.
#[derive(Debug)]
pub(crate) struct Place<S> {
    pub(crate) node: NodeId,
    shape: PhantomData<S>,
}

impl<'de, S> Deserialize<'de> for Place<S> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct First<S>(PhantomData<S>);
        impl<'de, S> Visitor<'de> for First<S> {
            type Value = Place<S>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the place of a value")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<Place<S>, A::Error> {
                let node = pair
                    .next_element()?
                    .ok_or_else(|| A::Error::custom("no place"))?;
                Ok(Place {
                    node: NodeId(node),
                    shape: PhantomData,
                })
            }
        }
        deserializer.deserialize_tuple_struct(PLACED, 1, First(PhantomData))
    }
}

impl<S: JsonSchema> JsonSchema for Place<S> {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> std::borrow::Cow<'static, str> {
        S::schema_name()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        generator.subschema_for::<S>()
    }
}

/// A mapping from names of the user's own, in the order of the file.
#[derive(Debug)]
pub(crate) struct Named<T>(pub(crate) Vec<(At<String>, T)>);

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Named<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for All<T> {
            type Value = Named<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Named<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<At<String>>()? {
                    if key.value.starts_with("x-") {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((key, map.next_value()?));
                    }
                }
                Ok(Named(entries))
            }
        }
        deserializer.deserialize_map(All(PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for Named<T> {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> std::borrow::Cow<'static, str> {
        format!("Named{}", T::schema_name()).into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let value = generator.subschema_for::<T>();
        json_schema!({"type": "object", "patternProperties": {"^x-": true}, "additionalProperties": value})
    }
}

/// A plan file.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "PlanFile")]
pub(crate) struct RawPlan {
    /// The version of the plan language: 1.
    #[schemars(required, range(min = 1, max = 1))]
    pub(crate) version: Option<At<u64>>,
    /// The plan's name.
    #[schemars(required, with = "String")]
    pub(crate) plan: Option<At<String>>,
    /// Values that are given when the plan is started, put in for `${NAME}`.
    #[schemars(with = "Option<Named<RawInput>>")]
    #[allow(dead_code, reason = "read on its own, before values are put in")]
    pub(crate) inputs: Option<Place<Named<RawInput>>>,
    /// The groups of hosts that phases and steps name.
    #[schemars(required)]
    pub(crate) fleet: Option<Named<RawGroup>>,
    /// A weekly window: a first phase that waits for it.
    #[schemars(with = "Option<lockstep_proto::action::gate::Window>")]
    pub(crate) window: Option<Place<()>>,
    /// The rollout has ended this long after it was submitted. Default: 2h.
    pub(crate) deadline: Option<At<Period>>,
    /// How long after compiling the plan may be used. Default: 24h.
    pub(crate) expires: Option<At<Period>>,
    /// How many hosts of the whole fleet may fail. Default: only the phases' own budgets count.
    pub(crate) max_failures: Option<u32>,
    /// Times that the report holds against what was measured.
    pub(crate) slo: Option<RawSlo>,
    /// The phases, in order. Each is closed on every host before the next one begins.
    #[schemars(required)]
    pub(crate) phases: Option<At<Vec<At<RawPhase>>>>,
    /// Checks that run after a rollback.
    pub(crate) after_rollback: Option<At<RawAfterRollback>>,
    /// Messages that are sent when something happens to the rollout.
    pub(crate) notices: Option<Vec<Place<super::draft::NoticeShape>>>,
    /// Roles that sign the report.
    pub(crate) signoff: Option<Vec<At<String>>>,
}

/// A declared input.
#[derive(Debug, Clone, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Input")]
pub(crate) struct RawInput {
    /// A regular expression that the whole value must match.
    #[schemars(with = "Option<String>")]
    pub(crate) pattern: Option<At<String>>,
    /// The values that are allowed.
    #[schemars(with = "Option<Vec<String>>")]
    pub(crate) one_of: Option<At<Vec<String>>>,
    /// The value if none is given.
    #[schemars(with = "Option<String>")]
    pub(crate) default: Option<At<String>>,
    /// What it is, for people.
    pub(crate) about: Option<String>,
}

/// A group of hosts: those that carry all of these labels.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Group")]
pub(crate) struct RawGroup {
    /// Label names and the values they must have.
    #[schemars(required, with = "Labels")]
    pub(crate) labels: Option<At<Labels>>,
}

/// Labels, in the order of the file. Label names are the user's own: `x-` is not special here.
pub(crate) type Labels = std::collections::BTreeMap<String, String>;

/// Times that the report holds against what was measured.
#[derive(Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Slo")]
pub(crate) struct RawSlo {
    /// The whole rollout.
    pub(crate) total: Option<Period>,
    /// From the first verified refusal to the first healthy check.
    pub(crate) downtime: Option<Period>,
    /// From the decision to roll back to its end.
    pub(crate) rollback: Option<Period>,
}

/// A part of a plan that is closed on every host before the next one begins.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Phase")]
pub(crate) struct RawPhase {
    /// Its name, unique in the plan.
    #[schemars(required, with = "String")]
    pub(crate) name: Option<At<String>>,
    /// The hosts of its steps, unless a step names its own.
    pub(crate) on: Option<Place<super::draft::OnShape>>,
    /// How the phase spreads over its hosts. Default: all.
    pub(crate) strategy: Option<At<RawStrategy>>,
    /// The steps, in order.
    #[schemars(required)]
    pub(crate) steps: Option<At<Vec<Place<super::draft::StepShape>>>>,
    /// A fence that is raised when the phase begins, and lowered when another begins.
    pub(crate) fence: Option<At<RawFence>>,
    /// The phase has been closed this long after it began, or the rollout is undone.
    pub(crate) deadline: Option<At<Period>>,
    /// Its row of the runbook's timeline, for the report.
    pub(crate) planned: Option<RawPlanned>,
}

/// Checks that run after a rollback.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "AfterRollback")]
pub(crate) struct RawAfterRollback {
    /// The hosts of its steps, unless a step names its own.
    pub(crate) on: Option<Place<super::draft::OnShape>>,
    /// The steps, in order.
    #[schemars(required)]
    pub(crate) steps: Option<At<Vec<Place<super::draft::StepShape>>>>,
    /// They have ended this long after they began.
    pub(crate) deadline: Option<At<Period>>,
}

/// A row of the runbook's timeline.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Planned")]
pub(crate) struct RawPlanned {
    /// From the rollout's start.
    pub(crate) at: Period,
    /// How long it should take.
    pub(crate) takes: Period,
    /// Who is responsible.
    pub(crate) owner: Option<String>,
}

/// A database state that lets no application write.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Fence")]
pub(crate) struct RawFence {
    /// The database, as its host's configuration names it.
    pub(crate) database: String,
    /// The way. Default: connect.
    #[serde(default)]
    pub(crate) via: FenceVia,
    /// The applications' roles.
    pub(crate) roles: Vec<String>,
    /// The database's hosts. Default: those of the phase.
    pub(crate) on: Option<Place<super::draft::OnShape>>,
    /// The phase that begins by lowering it.
    #[schemars(with = "String")]
    pub(crate) until: At<String>,
    /// The longest time for one attempt at raising it, and at lowering it. Default: 1h.
    pub(crate) timeout: Option<At<Period>>,
}

/// How a phase spreads over its hosts.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "Strategy")]
pub(crate) enum RawStrategy {
    /// All at once; none may fail.
    All,
    /// One batch after the other.
    Rolling(RawRolling),
    /// A few hosts first, then the others.
    Canary(RawCanary),
}

/// One batch after the other.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Rolling")]
pub(crate) struct RawRolling {
    /// How many hosts at once.
    pub(crate) batch: RawBatch,
    /// How many hosts of the phase may fail. Default: 0.
    #[serde(default)]
    pub(crate) max_failures: u32,
    /// Pause between batches. Default: none.
    #[serde(default)]
    pub(crate) pause: Period,
}

/// A few hosts first, then the others.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Canary")]
pub(crate) struct RawCanary {
    /// How many hosts go first.
    pub(crate) first: RawBatch,
    /// How long they are watched before the others follow.
    pub(crate) soak: Period,
}

/// A number of hosts: `2` or `25%`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawBatch(pub(crate) Batch);

impl<'de> Deserialize<'de> for RawBatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let batch = match text.strip_suffix('%') {
            Some(percent) => {
                let percent = percent.parse().ok().filter(|p| (1..=100).contains(p));
                percent.map(Batch::Percent)
            }
            None => text.parse().ok().filter(|n| *n > 0).map(Batch::Hosts),
        };
        batch.map(Self).ok_or_else(|| {
            D::Error::custom(format!(
                "`{text}` is no number of hosts, such as `2`, or `25%` (from 1% to 100%)"
            ))
        })
    }
}

impl JsonSchema for RawBatch {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Batch".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A number of hosts, such as `2`, or `25%`.",
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": "^([1-9][0-9]*|([1-9][0-9]?|100)%)$"},
            ],
        })
    }
}
