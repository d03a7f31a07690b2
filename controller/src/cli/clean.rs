//! Text from the wire, made fit for a terminal, and so for documents.

pub(crate) use lockstep_proto::shown::{json, line, lines};
use serde_json::Value;

/// Cleans every text of a JSON value, keys included; [`lines`] says how.
pub(crate) fn value(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(lines(&text)),
        Value::Array(items) => Value::Array(items.into_iter().map(self::value).collect()),
        Value::Object(map) => {
            let clean = |(key, item): (String, Value)| (line(&key), self::value(item));
            Value::Object(map.into_iter().map(clean).collect())
        }
        other => other,
    }
}
