//! What is published about the language is what it is.

use std::path::{Path, PathBuf};

use granit_parser::{Event, Parser, ScalarStyle};
use lockstep_core::plan::{Code, Plan};
use lockstep_core::schema::{catalogue_markdown, schema};
use lockstep_proto::action::CATALOGUE;
use serde_json::{Map, Value, json};

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

/// Holds a committed file against what is generated, or writes it with UPDATE_DOCS=1.
fn up_to_date(path: &str, generated: &str) {
    let file = repository(path);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&file, generated).unwrap();
    }
    let committed = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        committed == generated,
        "{path} is not what the code says; write it anew with\n    \
         UPDATE_DOCS=1 cargo test -p lockstep-core --test plan_docs"
    );
}

#[test]
fn the_catalogue_is_up_to_date() {
    up_to_date("docs/actions.md", &catalogue_markdown());
}

#[test]
fn the_published_schema_is_up_to_date() {
    let text = serde_json::to_string_pretty(&schema()).unwrap();
    up_to_date("docs/plan.schema.json", &format!("{text}\n"));
}

#[test]
fn the_catalogue_has_every_action_with_every_argument() {
    let page = catalogue_markdown();
    for row in CATALOGUE {
        let (_, section) = page.split_once(&format!("\n## {}\n", row.name)).unwrap();
        let section = section.split("\n## ").next().unwrap();
        assert!(section.contains(row.summary), "{}", row.name);
        let words = section.lines().filter(|line| line.starts_with("| `"));
        let required = words.clone().filter(|line| line.contains("| required |"));
        assert!(
            words.count() > 0 && required.count() > 0,
            "{}: {section}",
            row.name
        );
    }
}

#[test]
fn the_language_page_explains_every_code_and_key() {
    let page = std::fs::read_to_string(repository("docs/plan-language.md")).unwrap();
    for code in Code::ALL {
        let row = format!("| {code} | {} |", code.meaning());
        assert!(
            page.contains(&row),
            "docs/plan-language.md lacks the row\n{row}"
        );
    }
    let schema = schema();
    let mut keys: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
    for name in [
        "Phase",
        "AfterRollback",
        "Fence",
        "Planned",
        "Rolling",
        "Canary",
        "Input",
    ] {
        let properties = schema["$defs"][name]["properties"].as_object();
        keys.extend(properties.unwrap_or_else(|| panic!("no {name}")).keys());
    }
    for key in keys {
        assert!(
            page.contains(&format!("`{key}`")),
            "docs/plan-language.md lacks `{key}`"
        );
    }
}

/// The plan in the language page is one.
#[test]
fn the_examples_of_the_language_page_are_plans() {
    let page = std::fs::read_to_string(repository("docs/plan-language.md")).unwrap();
    let mut seen = 0;
    for block in page.split("```yaml\n").skip(1) {
        let text = block.split("```").next().unwrap();
        if text.contains("version: 1") {
            seen += 1;
            let plan = Plan::parse("docs/plan-language.md", text);
            let plan = plan.unwrap_or_else(|findings| panic!("{findings}"));
            assert!(plan.warnings().is_empty(), "{}", plan.warnings());
            conforms(text).unwrap();
        }
    }
    assert!(seen >= 1);
}

#[test]
fn good_plans_conform_to_the_schema() {
    for path in [
        "controller/core/tests/plans/s0.yaml",
        "deploy/examples/employee-system/plan.yaml",
        "deploy/examples/employee-system/install.yaml",
    ] {
        let Ok(text) = std::fs::read_to_string(repository(path)) else {
            panic!("{path} is missing");
        };
        conforms(&text).unwrap_or_else(|why| panic!("{path}: {why}"));
    }
}

#[test]
fn the_schema_refuses_what_the_reader_refuses() {
    let good = "version: 1\nplan: p\nfleet: {a: {labels: {r: a}}}\nphases:\n  - name: x\n    on: a\n    steps: [{check.port: {port: 80}}]\n";
    conforms(good).unwrap();
    for (from, to) in [
        ("version: 1", "version: 2"),
        ("plan: p\n", ""),
        ("plan: p", "plan: p\nbake: {}"),
        ("on: a", "on: {any: a}"),
        ("on: a", "on: []"),
        ("on: a", "on: a\n    deadline: 90"),
        ("on: a", "on: a\n    strategy: {rolling: {batch: 0%}}"),
        ("on: a", "on: a\n    strategy: blue_green"),
        ("port: 80", "port: 800000"),
        ("port: 80", "prt: 80"),
        ("{port: 80}", "{}"),
        ("check.port", "check.prt"),
        ("{port: 80}", "{port: 80}, check.tcp: {address: 80}"),
        ("{port: 80}", "{port: 80}, undo: never"),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good);
        assert!(
            conforms(&bad).is_err(),
            "{from} -> {to}: the schema takes it"
        );
        assert!(
            Plan::parse("p.yaml", &bad).is_err(),
            "{from} -> {to}: the reader takes it"
        );
    }
    let notes = good.replacen("on: a", "on: a\n    x-note: anything", 1);
    conforms(&notes).unwrap();
}

/// Whether a plan has the published shape. `${...}` fits everywhere, as it does in editors that
/// are told so: the schema describes the plan with its inputs put in.
fn conforms(text: &str) -> Result<(), String> {
    let schema = schema();
    check(&schema, &schema, &to_json(text), "$")
}

/// As much of JSON Schema as the published one uses; anything else is a panic.
fn check(root: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let Value::Object(schema) = schema else {
        return if *schema == json!(true) {
            Ok(())
        } else {
            Err(format!("{at}: refused"))
        };
    };
    if value.as_str().is_some_and(|text| text.contains("${")) {
        return Ok(());
    }
    let fits = |choices: &Value| {
        let choices = choices.as_array().unwrap().iter();
        choices
            .filter(|choice| check(root, choice, value, at).is_ok())
            .count()
    };
    let object = value.as_object();
    for (word, rule) in schema {
        let holds = match word.as_str() {
            "$ref" => {
                let name = rule.as_str().unwrap().strip_prefix("#/$defs/").unwrap();
                check(root, &root["$defs"][name], value, at)?;
                true
            }
            "type" => {
                let is = |name: &str| match name {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "number" => value.is_number(),
                    "integer" => value.is_i64() || value.is_u64(),
                    "boolean" => value.is_boolean(),
                    other => panic!("type {other}"),
                };
                match rule {
                    Value::Array(names) => names.iter().any(|name| is(name.as_str().unwrap())),
                    name => is(name.as_str().unwrap()),
                }
            }
            "anyOf" => fits(rule) > 0,
            "oneOf" => fits(rule) == 1,
            "allOf" => fits(rule) == rule.as_array().unwrap().len(),
            "enum" => rule.as_array().unwrap().contains(value),
            "const" => rule == value,
            "required" => {
                let mut keys = rule.as_array().unwrap().iter();
                object.is_none_or(|o| keys.all(|key| o.contains_key(key.as_str().unwrap())))
            }
            "minItems" => value
                .as_array()
                .is_none_or(|v| v.len() as u64 >= rule.as_u64().unwrap()),
            "minimum" => value.as_f64().is_none_or(|v| v >= rule.as_f64().unwrap()),
            "maximum" => value.as_f64().is_none_or(|v| v <= rule.as_f64().unwrap()),
            "pattern" => {
                let pattern = regex::Regex::new(rule.as_str().unwrap()).unwrap();
                value.as_str().is_none_or(|text| pattern.is_match(text))
            }
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(root, rule, item, &format!("{at}[{index}]"))?;
                }
                true
            }
            "properties" => {
                for (key, item) in object.into_iter().flatten() {
                    if let Some(rule) = rule.get(key) {
                        check(root, rule, item, &format!("{at}.{key}"))?;
                    }
                }
                true
            }
            "additionalProperties" => {
                let known = schema.get("properties");
                let notes = schema.contains_key("patternProperties");
                for (key, item) in object.into_iter().flatten() {
                    let is_known = known.is_some_and(|known| known.get(key).is_some());
                    if !(is_known || notes && key.starts_with("x-")) {
                        check(root, rule, item, &format!("{at}.{key}"))?;
                    }
                }
                true
            }
            "patternProperties" | "description" | "title" | "default" | "$schema" | "$defs"
            | "format" => true,
            other => panic!("{at}: the schema uses `{other}`"),
        };
        if !holds {
            return Err(format!("{at}: {value} does not fit {word}: {rule}"));
        }
    }
    Ok(())
}

/// A plan file as JSON, by another way than the reader's own.
fn to_json(text: &str) -> Value {
    fn value<'a>(events: &mut impl Iterator<Item = Event<'a>>, event: Event<'a>) -> Value {
        match event {
            Event::Scalar(text, ScalarStyle::Plain, ..) => match &*text {
                "true" => json!(true),
                "false" => json!(false),
                text => text
                    .parse::<i64>()
                    .map_or_else(|_| json!(text), |number| json!(number)),
            },
            Event::Scalar(text, ..) => json!(text),
            Event::SequenceStart(..) => {
                let mut items = Vec::new();
                loop {
                    match events.next().unwrap() {
                        Event::SequenceEnd => return Value::Array(items),
                        event => items.push(value(events, event)),
                    }
                }
            }
            Event::MappingStart(..) => {
                let mut map = Map::new();
                loop {
                    match events.next().unwrap() {
                        Event::MappingEnd => return Value::Object(map),
                        Event::Scalar(key, ..) => {
                            let event = events.next().unwrap();
                            map.insert(key.into_owned(), value(events, event));
                        }
                        event => panic!("{event:?}"),
                    }
                }
            }
            event => panic!("{event:?}"),
        }
    }
    let mut events = Parser::new_from_str(text).map(|event| event.unwrap().0);
    let first = events.by_ref().nth(2).unwrap();
    value(&mut events, first)
}
