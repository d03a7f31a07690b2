//! The plan language for editors (JSON Schema) and for readers (the catalogue's reference), both
//! from the types that plans are read into.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::OnceLock;

use lockstep_proto::action::{Action, ActionInfo, CATALOGUE, Class, Site};
use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::plan::raw::RawPlan;

/// The JSON Schema (draft 2020-12) of a plan file.
pub fn schema() -> Value {
    let generator = SchemaGenerator::new(SchemaSettings::draft2020_12());
    let mut schema = Value::from(generator.into_root_schema_for::<RawPlan>());
    if let Some(root) = schema.as_object_mut() {
        root.insert("title".to_owned(), json!("Lockstep plan"));
    }
    let hosts_actions: BTreeSet<String> = action_schemas()
        .iter()
        .filter(|(row, _)| row.site == Site::Host)
        .map(|(_, schema)| definition_name(schema))
        .collect();
    let definitions = schema.get_mut("$defs").and_then(Value::as_object_mut);
    for (name, definition) in definitions.into_iter().flatten() {
        // A step's `on` may stand among the arguments of its action.
        let properties = definition
            .get_mut("properties")
            .and_then(Value::as_object_mut);
        if let (true, Some(properties)) = (hosts_actions.contains(name), properties) {
            properties.insert("on".to_owned(), json!({"$ref": "#/$defs/On"}));
        }
    }
    complete(&mut schema);
    schema
}

/// Says of a schema from the types what the reader adds to it: `x-` keys are free wherever other
/// unknown ones are refused; what is optional is left out, and never `null`; a text may be written
/// without quotes, though YAML would make a number of it.
fn complete(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            if object.get("additionalProperties") == Some(&Value::Bool(false)) {
                object
                    .entry("patternProperties")
                    .or_insert_with(|| json!({"^x-": true}));
            }
            if let Some(Value::Array(types)) = object.get_mut("type") {
                types.retain(|name| name != "null");
                if let [only] = types.as_slice() {
                    let only = only.clone();
                    object.insert("type".to_owned(), only);
                }
            }
            let is_free = !["pattern", "enum", "const"]
                .iter()
                .any(|word| object.contains_key(*word));
            if is_free && object.get("type") == Some(&json!("string")) {
                object.insert("type".to_owned(), json!(["string", "number", "boolean"]));
            }
            if let Some(Value::Array(choices)) = object.get_mut("anyOf") {
                choices.retain(|choice| *choice != json!({"type": "null"}));
            }
            object.values_mut().for_each(complete);
        }
        Value::Array(items) => items.iter_mut().for_each(complete),
        _ => {}
    }
}

/// Each action with the schema of its arguments: a reference into [`definitions`].
fn action_schemas() -> &'static [(&'static ActionInfo, Value)] {
    &catalogue().0
}

/// What the schemas of actions refer to.
fn definitions() -> &'static Map<String, Value> {
    &catalogue().1
}

type Catalogue = (Vec<(&'static ActionInfo, Value)>, Map<String, Value>);

fn catalogue() -> &'static Catalogue {
    static CACHE: OnceLock<Catalogue> = OnceLock::new();
    CACHE.get_or_init(|| {
        // The whole plan first: then the definitions have the same names as in `schema`.
        let mut generator = SchemaGenerator::new(SchemaSettings::draft2020_12());
        generator.subschema_for::<RawPlan>();
        let schemas = Action::schemas(&mut generator);
        let rows = CATALOGUE.iter().zip(schemas);
        let rows = rows.map(|(row, (_, schema))| (row, Value::from(schema)));
        (rows.collect(), generator.take_definitions(true))
    })
}

fn definition_name(reference: &Value) -> String {
    let path = reference["$ref"].as_str().unwrap_or_default();
    path.rsplit('/').next().unwrap_or_default().to_owned()
}

fn definition(reference: &Value) -> &'static Value {
    definitions()
        .get(&definition_name(reference))
        .unwrap_or(&Value::Null)
}

/// The names of an action's arguments, in the order of their declaration.
pub(crate) fn arguments(action: &str) -> Vec<&'static str> {
    let mut rows = action_schemas().iter();
    let row = rows.find(|(row, _)| row.name == action);
    let properties = row.and_then(|(_, schema)| definition(schema)["properties"].as_object());
    properties
        .into_iter()
        .flat_map(|properties| properties.keys().map(String::as_str))
        .collect()
}

/// The keys that a mapping with these keys must have. serde tells a reader which keys a type has,
/// but of the missing ones only the first; the schema knows all.
pub(crate) fn required(fields: &[&str]) -> &'static [String] {
    static CACHE: OnceLock<BTreeMap<Vec<String>, Vec<String>>> = OnceLock::new();
    let table = CACHE.get_or_init(|| {
        let mut table = BTreeMap::new();
        for definition in definitions().values() {
            let Some(properties) = definition["properties"].as_object() else {
                continue;
            };
            let mut keys: Vec<String> = properties.keys().cloned().collect();
            keys.sort();
            let required = definition["required"].as_array();
            let names = required.into_iter().flatten().filter_map(Value::as_str);
            table.insert(keys, names.map(str::to_owned).collect());
        }
        table
    });
    let mut keys: Vec<String> = fields.iter().map(|&field| field.to_owned()).collect();
    keys.sort();
    table.get(&keys).map_or(&[], Vec::as_slice)
}

/// The reference of all actions, as Markdown.
pub fn catalogue_markdown() -> String {
    let mut page = String::from(
        "# Actions\n\n\
         What a step of a plan may do. This page is generated from the types that plans are read \
         into.\n\n\
         **Class** says what a crash in the middle of an attempt means: an *observing* action \
         changes nothing and is asked again; of a *convergent* one a probe sees whether its \
         effect is there; the effect of a *receipted* one carries the step's key; of a *blind* one \
         nothing can be known afterwards, and a person decides. **Site** is where it runs. \
         **Undo** says whether a rollback returns to the state before.\n\n\
         | Action | Class | Site | Undo | |\n|---|---|---|---|---|\n",
    );
    for row in CATALOGUE {
        let ActionInfo {
            name,
            class,
            site,
            undo,
            summary,
        } = row;
        let anchor = name.replace('.', "");
        let undo = if *undo { "yes" } else { "no" };
        let (class, site) = (class_name(*class), site_name(*site));
        let _ = writeln!(
            page,
            "| [`{name}`](#{anchor}) | {class} | {site} | {undo} | {summary} |"
        );
    }
    let mut named = BTreeSet::new();
    for (row, reference) in action_schemas() {
        let _ = write!(page, "\n## {}\n\n{}\n\n", row.name, row.summary);
        write_arguments(&mut page, definition(reference), &mut named);
    }
    write_types(&mut page, &named);
    page
}

fn class_name(class: Class) -> &'static str {
    match class {
        Class::Observing => "observing",
        Class::Convergent => "convergent",
        Class::Receipted => "receipted",
        Class::Blind => "blind",
    }
}

fn site_name(site: Site) -> &'static str {
    match site {
        Site::Host => "host",
        Site::Controller => "controller",
    }
}

/// A table of the keys of one mapping; `named` collects the types that need words of their own.
fn write_arguments(page: &mut String, definition: &Value, named: &mut BTreeSet<String>) {
    let required: Vec<&str> = definition["required"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    page.push_str("| Argument | Type | | Meaning |\n|---|---|---|---|\n");
    let properties = definition["properties"].as_object();
    let mut rows: Vec<(&String, &Value)> = properties.into_iter().flatten().collect();
    rows.sort_by_key(|(name, _)| !required.contains(&name.as_str()));
    for (name, schema) in rows {
        let is_required = required.contains(&name.as_str());
        let needed = if is_required { "required" } else { "" };
        let kind = type_name(schema, named);
        let meaning = cell(schema["description"].as_str().unwrap_or_default());
        let _ = writeln!(page, "| `{name}` | {kind} | {needed} | {meaning} |");
    }
}

/// The types that arguments refer to, and those that these refer to.
fn write_types(page: &mut String, named: &BTreeSet<String>) {
    page.push_str("\n# Types of arguments\n");
    let mut done = BTreeSet::new();
    let mut open: BTreeSet<String> = named.clone();
    while let Some(name) = open.pop_first() {
        if !done.insert(name.clone()) {
            continue;
        }
        let Some(definition) = definitions().get(&name) else {
            continue;
        };
        let words = definition["description"].as_str().unwrap_or_default();
        let _ = write!(page, "\n## {name}\n\n{words}\n\n");
        let mut found = BTreeSet::new();
        if definition["properties"].is_object() {
            write_arguments(page, definition, &mut found);
        } else if let Some(choices) = definition["oneOf"].as_array() {
            page.push_str("| Value | Meaning |\n|---|---|\n");
            for choice in choices {
                let value = choice["const"].as_str().unwrap_or_default();
                let meaning = cell(choice["description"].as_str().unwrap_or_default());
                let _ = writeln!(page, "| `{value}` | {meaning} |");
            }
        }
        open.extend(found.into_iter().filter(|name| !done.contains(name)));
    }
}

fn cell(text: &str) -> String {
    text.replace('\n', " ").replace('|', "\\|")
}

/// A schema in a few words.
fn type_name(schema: &Value, named: &mut BTreeSet<String>) -> String {
    if schema["$ref"].is_string() {
        let name = definition_name(schema);
        let anchor = name.to_lowercase();
        named.insert(name.clone());
        return format!("[{name}](#{anchor})");
    }
    if let Some(choices) = schema["anyOf"].as_array() {
        let real: Vec<_> = choices
            .iter()
            .filter(|choice| choice["type"] != "null")
            .collect();
        let words: Vec<String> = real.iter().map(|choice| type_name(choice, named)).collect();
        return words.join(" or ");
    }
    let kind = match &schema["type"] {
        Value::Array(kinds) => kinds
            .iter()
            .find(|kind| *kind != "null")
            .unwrap_or(&Value::Null),
        one => one,
    };
    match kind.as_str() {
        Some("string") => "text".to_owned(),
        Some("integer") => "whole number".to_owned(),
        Some("boolean") => "true or false".to_owned(),
        Some("array") => format!("list of {}", type_name(&schema["items"], named)),
        Some("object") => match &schema["additionalProperties"] {
            value @ Value::Object(_) => format!("mapping to {}", type_name(value, named)),
            _ => "mapping".to_owned(),
        },
        _ => "any value".to_owned(),
    }
}
