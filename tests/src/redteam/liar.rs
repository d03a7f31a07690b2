//! A hostile host: holds its own certificate, and says what it likes to a real controller.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use lockstep_proto::ids::{Digest, Direction, RolloutId, StepKey, StepRef};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Refusal, Report, ReportBody, StepOutcome};
use lockstep_proto::values::{Period, Timestamp};
use lockstep_proto::wire::agent_v1::agent_service_client::AgentServiceClient;
use lockstep_proto::wire::agent_v1::{self as wire, up};
use serde_json::{Value, json};
use tonic::transport::Channel;

use crate::cluster::Cluster;
use crate::operator::text;
use crate::played::{Agent, Dial, hello};
use crate::wait;

mod poison;

/// The hostile host; its certificate is real.
const LIAR: &str = "evil-1";

/// Moves a cursor, clears a screen, writes a line of its own, a title, markup, and text backwards.
const POISON: &str = "\u{1b}[2J\u{1b}]0;owned\u{7}x\r\nFORGED line\u{0}\u{8}\u{9b}31m\u{202e}\
                      <script>alert('owned')</script><img src=x onerror=\"owned\">&amp;\u{7f}";

/// What the liar has said, and what came of it.
#[derive(Debug, Default)]
struct Said {
    reports: BTreeSet<String>,
    refused: u64,
    ignored: u64,
    accepted: Vec<String>,
    wrong: Vec<String>,
}

struct Liar {
    cluster: Cluster,
    channel: Channel,
    agent: Agent,
    said: Said,
    /// A rollout of others, which waits at a gate.
    others: String,
    /// One of the liar's own, whose first step was ordered.
    own: RolloutId,
    plan: Digest,
    before: Value,
    /// Offers since it began to answer with poison.
    seen: u32,
}

/// What a hostile host gets a real controller to believe. The figures, and whether they are good.
pub fn hostile_host() -> Result<(Value, Result<()>)> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let mut liar = Liar::begin().await?;
        let played = liar.play().await;
        let said = &liar.said;
        let figures = json!({
            "hostile_reports": said.reports.len(),
            "hostile_refused": said.refused,
            "hostile_ignored": said.ignored,
            "accepted": said.accepted.len(),
            "what_was_accepted": said.accepted,
            "hostile_wrong": said.wrong,
        });
        let judged = played.and_then(|()| {
            let count = said.reports.len();
            ensure!(said.accepted.is_empty(), "accepted: {:#?}", said.accepted);
            ensure!(said.wrong.is_empty(), "wrong: {:#?}", said.wrong);
            ensure!(count >= 50, "only {count} hostile reports were sent");
            Ok(())
        });
        let words = |error: anyhow::Error| error.context(liar.cluster.last_words());
        Ok((figures, judged.map_err(words)))
    })
}

impl Liar {
    async fn begin() -> Result<Self> {
        let mut builder = Cluster::builder()
            .without_database()
            .hosts(&[("app-1", "app"), (LIAR, "evil")]);
        for host in ["app-1", LIAR] {
            builder = builder.policy(host, Some("[[allow]]\naction = \"exec.run\"\n"));
        }
        let mut cluster = builder.start()?;
        cluster.host_mut(LIAR).stop_agent();
        let channel = dial(&cluster)?.channel().await?;
        let agent = session(&channel, 9).await?;
        let others = submit(&cluster, "others", "app", true)?;
        let mut liar = Self {
            channel,
            agent,
            said: Said::default(),
            others,
            own: RolloutId::from_random([0; 6]),
            plan: Digest::of(b""),
            before: Value::Null,
            seen: 0,
            cluster,
        };
        let waits = || {
            let gates = liar.cluster.requester().open_gates(&liar.others);
            let gates = gates.map_err(|error| format!("{error:#}"))?;
            if gates.is_empty() {
                Err("no gate".to_owned())
            } else {
                Ok(())
            }
        };
        wait::until("the others' gate", wait::SOON, waits)?;
        let own = submit(&liar.cluster, "own", "evil", false)?;
        let order = liar.agent.ordered().await?;
        let order = order.into_order(LIAR.parse()?)?;
        ensure!(
            own == order.key.rollout.as_str(),
            "ordered for {}",
            order.key
        );
        (liar.own, liar.plan) = (order.key.rollout, order.plan);
        liar.before = liar.look()?;
        Ok(liar)
    }

    /// What the controller says of both rollouts.
    fn look(&self) -> Result<Value> {
        let requester = self.cluster.requester();
        let both = [self.others.as_str(), self.own.as_str()];
        let seen = both.map(|rollout| requester.rollout(rollout));
        let seen = seen.into_iter().collect::<Result<Vec<Value>>>()?;
        let parts = seen.iter().map(|document| {
            let mut document = document.clone();
            // Clocks go on, and the liar comes and goes.
            for name in ["now", "elapsed", "elapsed_ms", "took_ms", "absent"] {
                document.as_object_mut().map(|fields| fields.remove(name));
            }
            document
        });
        Ok(parts.collect())
    }

    /// Says something that must change nothing, in a session that it may end.
    async fn says(&mut self, name: &str, message: Option<up::Message>) -> Result<()> {
        ensure!(self.said.reports.insert(name.to_owned()), "{name} twice");
        self.agent.send(message).await;
        // Whatever comes next says that it was heard.
        if self.agent.next().await.is_ok() {
            self.said.ignored += 1;
        } else {
            self.said.refused += 1;
            self.agent = session(&self.channel, 9).await?;
        }
        self.agent.number = self.agent.number.max(self.agent.welcome.acknowledged + 1);
        self.unchanged(name)
    }

    fn unchanged(&mut self, name: &str) -> Result<()> {
        let now = self.look()?;
        if now != self.before {
            self.said
                .accepted
                .push(format!("{name}: {}", changes(&self.before, &now)));
            self.before = now;
        }
        Ok(())
    }

    /// Reports something, with the number that is due.
    async fn reports(&mut self, name: &str, body: ReportBody) -> Result<()> {
        // It may have been taken or not: the next session says which number is due.
        self.agent = session(&self.channel, 9).await?;
        let number = self.agent.number;
        self.reports_as(name, number, body).await
    }

    async fn reports_as(&mut self, name: &str, number: u64, body: ReportBody) -> Result<()> {
        let head = None;
        let report = Report { number, body, head };
        self.says(name, Some(up::Message::Report(report.into())))
            .await
    }

    async fn play(&mut self) -> Result<()> {
        self.about_others().await?;
        self.out_of_order().await?;
        self.numbers().await?;
        self.no_reports().await?;
        self.sessions().await?;
        self.output().await?;
        self.poison().await?;
        self.the_others_end_well()
    }

    fn finished(key: StepKey) -> ReportBody {
        ReportBody::Finished {
            key,
            outcome: StepOutcome::Ok {
                changed: true,
                summary: "FORGED".into(),
            },
            facts: vec![Fact::Backup {
                database: "sales".into(),
                id: "FORGED".into(),
                digest: Digest::of(b"FORGED"),
                size: 1,
                taken_at: Timestamp(0),
                fence: None,
            }],
            took: Period(1),
            signatures: vec![],
        }
    }

    /// In the names of other hosts, and of rollouts that are not its own.
    async fn about_others(&mut self) -> Result<()> {
        let others: RolloutId = self.others.parse()?;
        let nobody = RolloutId::from_random([0xee; 6]);
        let own = self.own.clone();
        for (rollout, what) in [(&others, "others'"), (&own, "own"), (&nobody, "no")] {
            for host in ["app-1", "app-9", "controller", LIAR] {
                // Its own host in its own rollout is what it may speak of.
                if host == LIAR && *rollout == own {
                    continue;
                }
                for (phase, step) in [(0, 0), (2, 0)] {
                    let key = StepKey {
                        rollout: rollout.clone(),
                        host: host.parse()?,
                        at: StepRef { phase, step },
                        direction: Direction::Do,
                        attempt: 1,
                    };
                    let of = format!("{what} rollout, {host}, step {}", key.at);
                    let started = ReportBody::Started { key: key.clone() };
                    self.reports(&format!("started: {of}"), started).await?;
                    let finished = Self::finished(key);
                    self.reports(&format!("finished: {of}"), finished).await?;
                }
            }
        }
        for (rollout, what) in [(others, "others'"), (nobody, "no")] {
            let state = vec![Fact::State {
                name: "release shop".into(),
                digest: Digest::of(b"FORGED"),
                text: "FORGED".into(),
            }];
            let consented = ReportBody::Consented {
                round: 0,
                rollout: rollout.clone(),
                plan: self.plan,
                state: state.clone(),
            };
            self.reports(&format!("consented: {what} rollout"), consented)
                .await?;
            let refusals = vec![Refusal {
                at: None,
                reason: "FORGED".into(),
            }];
            let declined = ReportBody::Declined {
                rollout: rollout.clone(),
                refusals,
            };
            self.reports(&format!("declined: {what} rollout"), declined)
                .await?;
            let surveyed = ReportBody::Surveyed { rollout, state };
            self.reports(&format!("surveyed: {what} rollout"), surveyed)
                .await?;
        }
        Ok(())
    }

    /// Of its own rollout: steps, attempts and directions that were not ordered.
    async fn out_of_order(&mut self) -> Result<()> {
        use Direction::{Do, Probe, Undo};
        let key = |at: (u16, u16), direction: Direction, attempt: u16| StepKey {
            rollout: self.own.clone(),
            host: LIAR.parse().expect("a host's name"),
            at: StepRef {
                phase: at.0,
                step: at.1,
            },
            direction,
            attempt,
        };
        let keys = [
            ("the next step", key((0, 1), Do, 1)),
            ("a step that is not there", key((0, 9), Do, 1)),
            ("a phase that is not there", key((9, 0), Do, 1)),
            (
                "the last there can be",
                key((u16::MAX, u16::MAX), Do, u16::MAX),
            ),
            ("attempt zero", key((0, 0), Do, 0)),
            ("the next attempt", key((0, 0), Do, 2)),
            ("an attempt far away", key((0, 0), Do, u16::MAX)),
            ("an undo", key((0, 0), Undo, 1)),
            ("an undo of the next step", key((0, 1), Undo, 1)),
            ("a probe", key((0, 0), Probe, 1)),
        ];
        for (name, key) in keys {
            let started = ReportBody::Started { key: key.clone() };
            self.reports(&format!("not ordered, started: {name}"), started)
                .await?;
            let finished = Self::finished(key);
            self.reports(&format!("not ordered, finished: {name}"), finished)
                .await?;
        }
        let other = ReportBody::Consented {
            round: 0,
            rollout: self.own.clone(),
            plan: Digest::of(b"another plan"),
            state: vec![],
        };
        self.reports("consented to another plan", other).await
    }

    /// Reports that are not the next one: the good one would end the step that was ordered.
    async fn numbers(&mut self) -> Result<()> {
        self.agent = session(&self.channel, 9).await?;
        let next = self.agent.number;
        let good = Self::finished(StepKey {
            rollout: self.own.clone(),
            host: LIAR.parse()?,
            at: StepRef { phase: 0, step: 0 },
            direction: Direction::Do,
            attempt: 1,
        });
        for (name, number) in [
            ("zero", 0),
            ("one", 1),
            ("the last one", next - 1),
            ("the next but one", next + 1),
            ("a thousand ahead", next + 1000),
            ("the greatest but one", u64::MAX - 1),
            ("the greatest", u64::MAX),
        ] {
            let name = format!("number: {name}");
            self.reports_as(&name, number, good.clone()).await?;
        }
        Ok(())
    }

    /// Bytes that are no report.
    async fn no_reports(&mut self) -> Result<()> {
        let good = serde_json::to_vec(&Self::finished(StepKey {
            rollout: self.own.clone(),
            host: LIAR.parse()?,
            at: StepRef { phase: 0, step: 0 },
            direction: Direction::Do,
            attempt: 1,
        }))?;
        let whole = String::from_utf8(good)?;
        let deep = "[".repeat(20_000);
        let cases: Vec<(&str, String)> = vec![
            ("nothing", String::new()),
            ("no JSON", "{".into()),
            ("cut in half", whole[..whole.len() / 2].into()),
            ("twice", whole.repeat(2)),
            ("deep", deep),
            ("an unknown kind", "{\"owned\":{}}".into()),
            (
                "two kinds",
                format!("{},{}", &whole[..whole.len() - 1], &whole[1..]),
            ),
            (
                "a number too large",
                whole.replace("\"size\":1", "\"size\":1e400"),
            ),
            (
                "larger than any",
                format!("{whole}{}", " ".repeat(200 << 10)),
            ),
            (
                "a little larger than any",
                format!("{whole}{}", " ".repeat(31 << 10)),
            ),
            ("another host within", whole.replace(LIAR, "app-1")),
            ("a host that is a path", whole.replace(LIAR, "../../app-1")),
            ("a poisoned host", whole.replace(LIAR, "app-1\\n\\u001b[2J")),
        ];
        for (name, json) in cases {
            self.agent = session(&self.channel, 9).await?;
            let report = wire::Report {
                number: self.agent.number,
                body_json: json.into_bytes().into(),
                head: None,
            };
            let name = format!("no report: {name}");
            self.says(&name, Some(up::Message::Report(report))).await?;
        }
        self.agent = session(&self.channel, 9).await?;
        let again = hello("app-1", 9)?.into();
        self.says(
            "a second hello, of another host",
            Some(up::Message::Hello(again)),
        )
        .await?;
        self.says("nothing at all", None).await
    }

    /// Sessions that must not be.
    async fn sessions(&mut self) -> Result<()> {
        let poisoned = wire::Hello::from(hello(LIAR, 9)?);
        let with = |change: &dyn Fn(&mut wire::Hello)| {
            let mut hello = poisoned.clone();
            change(&mut hello);
            hello
        };
        let many = |count: usize| {
            let label = |number: usize| (format!("label{number}"), "x".repeat(100));
            (0..count).map(label).collect()
        };
        let cases: Vec<(&str, wire::Hello)> = vec![
            ("another host", hello("app-1", 9)?.into()),
            ("a host that is not there", hello("app-9", 9)?.into()),
            ("the controller", hello("controller", 9)?.into()),
            ("another instance", hello(LIAR, 8)?.into()),
            ("no host", with(&|it| it.host = String::new())),
            (
                "a poisoned host",
                with(&|it| it.host = format!("{LIAR}{POISON}")),
            ),
            (
                "a poisoned instance",
                with(&|it| it.instance = POISON.into()),
            ),
            ("a poisoned boot", with(&|it| it.boot = POISON.into())),
            (
                "a rollout that is none",
                with(&|it| it.held_rollout = POISON.into()),
            ),
            (
                "a great release",
                with(&|it| it.agent_version = "9".repeat(5000)),
            ),
            ("great labels", with(&|it| it.labels = many(200))),
            (
                "no version in common",
                with(&|it| {
                    (it.min_version, it.max_version) = (900, 901);
                }),
            ),
        ];
        // One of them is up all the time: another instance is not let in beside it.
        self.agent = session(&self.channel, 9).await?;
        for (name, hello) in cases {
            let name = format!("hello: {name}");
            ensure!(self.said.reports.insert(name.clone()), "{name} twice");
            match Agent::begin(self.channel.clone(), hello).await {
                Err(_) => self.said.refused += 1,
                Ok(_) => self.said.accepted.push(format!("{name}: it is welcome")),
            }
            self.unchanged(&name)?;
        }
        // Nor is anything of others shown.
        let mut client = AgentServiceClient::new(self.channel.clone());
        let documents = [self.others.as_str()];
        for rollout in documents {
            let document = self.cluster.requester().rollout(rollout)?;
            let digest: Digest = text(&document["plan_digest"])
                .parse()
                .or_else(|_| text(&document["digest"]).parse())
                .context("the others' plan")?;
            let request = wire::FetchBlobRequest {
                digest: digest.0.to_vec().into(),
            };
            let name = "the others' plan";
            self.said.reports.insert(name.to_owned());
            match client.fetch_blob(request).await {
                Err(_) => self.said.refused += 1,
                Ok(_) => self.said.accepted.push(format!("{name} is shown")),
            }
        }
        Ok(())
    }

    /// Output in other hosts' names, and more of it than is kept.
    async fn output(&mut self) -> Result<()> {
        let mut client = AgentServiceClient::new(self.channel.clone());
        let own = |host: &str, rollout: &str, step: u16| format!("{rollout}.0.{step}.do.1@{host}");
        let chunk = |key: String, offset: u64, data: Vec<u8>| wire::LogChunk {
            key,
            offset,
            data: data.into(),
            progress_permille: Some(5000),
            progress_text: POISON.into(),
        };
        let poison = POISON.as_bytes().to_vec();
        let mine = own(LIAR, self.own.as_str(), 0);
        let refused: Vec<(&str, wire::LogChunk)> = vec![
            (
                "of another host",
                chunk(own("app-1", &self.others, 0), 0, poison.clone()),
            ),
            (
                "of another rollout",
                chunk(own(LIAR, "ro_eeeeeeeeeeee", 0), 0, poison.clone()),
            ),
            (
                "of a path",
                chunk("../../x@evil-1".into(), 0, poison.clone()),
            ),
            ("too large", chunk(mine.clone(), 0, vec![b'x'; 200 << 10])),
            ("too far", chunk(mine.clone(), u64::MAX, poison.clone())),
        ];
        for (name, chunk) in refused {
            let name = format!("output: {name}");
            ensure!(self.said.reports.insert(name.clone()), "{name} twice");
            match client.logs(tokio_stream::iter([chunk])).await {
                Err(_) => self.said.refused += 1,
                Ok(_) => self.said.accepted.push(format!("{name} is kept")),
            }
            self.unchanged(&name)?;
        }
        // Its own is kept, up to a bound.
        let flood = (0..2000_u64).map(move |number| {
            let data = if number == 0 {
                poison.clone()
            } else {
                vec![b'x'; 32 << 10]
            };
            chunk(mine.clone(), number * (32 << 10), data)
        });
        let kept = client.logs(tokio_stream::iter(flood)).await?;
        let kept = kept.into_inner().kept_bytes;
        self.said.reports.insert("output: a flood".into());
        ensure!(kept <= 4 << 20, "{kept} bytes of output are kept");
        self.said.ignored += 1;
        Ok(())
    }

    /// What honest hosts do goes on as if nothing had been said.
    fn the_others_end_well(&mut self) -> Result<()> {
        let people = self.cluster.approvers();
        let people: Vec<_> = people.iter().collect();
        let ended = crate::operator::answer_gates(&people, &self.others, wait::ROLLOUT, |_, _| {})?;
        let state = text(&ended["state"]);
        ensure!(state == "succeeded", "{}", self.cluster.explain(&ended));
        let effects = fs::read_to_string(self.cluster.host("app-1").effects())?;
        ensure!(effects == "others\nothers\n", "app-1 has done {effects:?}");
        Ok(())
    }
}

fn labels(pairs: &[(&str, &str)]) -> std::collections::HashMap<String, String> {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

fn dial(cluster: &Cluster) -> Result<Dial> {
    let read = |name: &str| fs::read_to_string(cluster.pki().join(name));
    let certificate = read(&format!("agent-{LIAR}.crt"))?;
    let key = read(&format!("agent-{LIAR}.key"))?;
    let address = cluster.address().parse()?;
    Dial::new(
        address,
        Some((&certificate, &key)),
        &read("ca-controllers.crt")?,
    )
}

/// A session of the liar's, as its own host.
async fn session(channel: &Channel, instance: u8) -> Result<Agent> {
    let mut hello = hello(LIAR, instance)?;
    // One that says that it has fewer than are known has lost its journal.
    hello.last_report = 1 << 40;
    hello.labels = [("role".to_owned(), "evil".to_owned())].into();
    let begun = Agent::begin(channel.clone(), hello.into()).await;
    begun.map_err(|status| anyhow::anyhow!("the liar's own session: {status}"))
}

/// Submits a plan of two commands for a role; with a gate between them, if one is wanted.
fn submit(cluster: &Cluster, name: &str, role: &str, gated: bool) -> Result<String> {
    let script = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\\\n')";
    let step = format!(
        "      - exec.run: {{name: note, argv: [python3, -c, \"{script}\", \
         \"${{host.effects_file}}\", {name}]}}\n"
    );
    let gate = "  - name: approve\n    steps:\n      - gate.approval: {from: {dba: 1}, timeout: \
                5m}\n  - name: after\n    on: it\n    steps:\n";
    let between = if gated { gate } else { "" };
    let plan = format!(
        "version: 1\nplan: {name}\nfleet:\n  it: {{labels: {{role: {role}}}}}\nphases:\n  - name: \
         one\n    on: it\n    steps:\n{step}{between}{step}"
    );
    let file: PathBuf = cluster.root().join(format!("{name}.yaml"));
    fs::write(&file, plan)?;
    cluster.requester().submit(&file, &[])
}

/// The first difference of two documents, in words.
fn changes(before: &Value, after: &Value) -> String {
    match (before, after) {
        (Value::Object(a), Value::Object(b)) => {
            let differs = |name: &&String| a.get(*name) != b.get(*name);
            let name = a.keys().chain(b.keys()).find(differs);
            name.map_or_else(String::new, |name| {
                let inner = changes(&before[name], &after[name]);
                format!(".{name}{inner}")
            })
        }
        (Value::Array(a), Value::Array(b)) => {
            let at = (0..a.len().max(b.len())).find(|at| a.get(*at) != b.get(*at));
            at.map_or_else(String::new, |at| {
                format!("[{at}]{}", changes(&before[at], &after[at]))
            })
        }
        _ => format!(": {before} -> {after}"),
    }
}
