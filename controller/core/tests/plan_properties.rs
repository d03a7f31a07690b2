//! Whatever a file holds, reading it ends with a plan or with findings.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use lockstep_core::compile::compile;
use lockstep_core::plan::Plan;
use lockstep_proto::seal::open;
use lockstep_proto::values::Timestamp;
use proptest::prelude::*;
use proptest::sample::{Index, select};

fn s0() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plans/s0.yaml");
    std::fs::read_to_string(path).unwrap()
}

/// Reads a text in every way there is, and holds what comes out against what was promised.
fn read(text: &str) -> Result<(), TestCaseError> {
    match Plan::parse("p.yaml", text) {
        Ok(plan) => {
            prop_assert!(!plan.warnings().has_errors());
            let given = BTreeMap::from([("release".to_owned(), "v1.2.3".to_owned())]);
            if let Ok(sealed) = compile(&plan, &given, 1, Timestamp(5)) {
                let again = compile(&plan, &given, 1, Timestamp(5)).unwrap();
                prop_assert_eq!(sealed.bytes(), again.bytes());
                prop_assert_eq!(&open(sealed.bytes()).unwrap(), &sealed);
                prop_assert!(
                    sealed
                        .plan()
                        .phases
                        .iter()
                        .all(|phase| !phase.stages.is_empty())
                );
            }
        }
        Err(findings) => {
            prop_assert!(findings.has_errors(), "refused without a reason");
            let lines = text.split(['\n', '\r']).count();
            for finding in &findings {
                prop_assert!((1..=lines + 1).contains(&finding.line), "{finding}");
                prop_assert!(finding.column >= 1 && finding.width >= 1);
                let shown = finding.to_string();
                let odd = |c: char| c.is_control() && c != '\n';
                prop_assert!(!shown.contains(odd), "{shown:?}");
                prop_assert!(shown.lines().count() <= 6, "one line each: {shown:?}");
            }
        }
    }
    Ok(())
}

/// Pieces of which YAML and plans are made.
fn piece() -> impl Strategy<Value = String> {
    let pieces = select(vec![
        "version: 1\n",
        "plan: p\n",
        "fleet: {a: {labels: {r: a}}}\n",
        "phases:\n",
        "  - name: x\n",
        "    on: a\n",
        "    steps:\n",
        "      - check.port: {port: 80}\n",
        "inputs: {i: {}}\n",
        "${i}",
        "${host.x}",
        "${",
        "$$",
        "secret://x",
        ": ",
        "- ",
        "\n",
        "  ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "'",
        "\"",
        "&a ",
        "*a",
        "!!str ",
        "|\n",
        ">\n",
        "? ",
        "#",
        "%YAML 1.1\n",
        "---\n",
        "...\n",
        "\t",
        "~",
        "null",
        "0x1f",
        "1e9",
        "-1",
        "25%",
        "\u{feff}",
        "\u{0}",
        "é",
        "🎉",
        "\r\n",
        "<<: ",
        "x-a: ",
    ]);
    prop_oneof![
        4 => pieces.prop_map(str::to_owned),
        1 => "[a-z.0-9]{1,8}",
        1 => any::<char>().prop_map(String::from),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bytes_are_read_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        read(&String::from_utf8_lossy(&bytes))?;
    }

    #[test]
    fn pieces_of_yaml_are_read_to_an_end(pieces in proptest::collection::vec(piece(), 0..60)) {
        read(&pieces.concat())?;
    }

    /// A real plan with a few pieces put in, or lines taken out.
    #[test]
    fn a_damaged_plan_is_read_to_an_end(
        damage in proptest::collection::vec((any::<Index>(), 0_usize..3, piece()), 0..4),
    ) {
        let text = s0();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        for (at, take, piece) in damage {
            let at = at.index(lines.len());
            lines.drain(at..(at + take).min(lines.len() - 1).max(at));
            let at = at.min(lines.len() - 1);
            let line = &mut lines[at];
            let middle = line.char_indices().nth(line.chars().count() / 2).map_or(0, |(i, _)| i);
            line.insert_str(middle, &piece);
        }
        read(&lines.join("\n"))?;
    }
}

#[test]
fn bombs_of_aliases_and_depth_are_refused_at_once() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..12 {
        let below = format!("*a{}", level - 1);
        let items = [below.as_str(); 10].join(", ");
        writeln!(bomb, "a{level}: &a{level} [{items}]").unwrap();
    }
    let mut stairs = String::new();
    for step in 0..3000 {
        writeln!(stairs, "{:step$}-", "").unwrap();
    }
    let deep = [
        "[".repeat(100_000),
        "{a: ".repeat(100_000),
        stairs,
        "- ".repeat(100_000),
        "? ".repeat(100_000),
    ];
    for text in deep.iter().chain([&bomb]) {
        let findings = Plan::parse("bomb.yaml", text).expect_err("no plan");
        assert!(findings.has_errors());
    }
}

/// The largest files that are read at all, with as many mistakes as fit in.
#[test]
fn a_file_full_of_mistakes_is_read_in_bounded_time() {
    let head =
        "version: 1\nplan: p\nfleet: {a: {labels: {r: a}}}\nphases:\n  - name: x\n    on: a\n";
    let steps = format!(
        "{head}    steps:\n{}",
        "      - check.prt: {port: x}\n".repeat(10_000)
    );
    let keys = (0..20_000).fold(String::new(), |text, n| text + &format!("key{n}: 1\n"));
    let wrong = format!(
        "{head}    steps:\n{}",
        "      - check.port: {port: x}\n".repeat(10_000)
    );
    let phases = format!(
        "{head}    steps: []\n{}",
        "  - {name: 5, deadline: x}\n".repeat(10_000)
    );
    for text in [steps, keys, wrong, phases] {
        let start = std::time::Instant::now();
        let findings = Plan::parse("p.yaml", &text).expect_err("no plan");
        assert!(findings.len() >= 200, "{}", findings.len());
        let took = start.elapsed().as_secs();
        assert!(took < 60, "{took} s for {} findings", findings.len());
    }
}
