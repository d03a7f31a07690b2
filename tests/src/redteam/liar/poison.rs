//! What a hostile host writes for people's eyes: poison in every text that it may send.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use lockstep_proto::ids::{Digest, Direction, StepKey, StepRef};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure, Refusal, ReportBody, StepOutcome};
use lockstep_proto::values::Period;
use lockstep_proto::wire::agent_v1::{self as wire, down};

use super::{LIAR, Liar, POISON, labels, session, submit};
use crate::played::{Agent, hello};

impl Liar {
    /// Everything that a host may say of itself, poisoned; then what people see.
    pub(super) async fn poison(&mut self) -> Result<()> {
        let first = StepKey {
            rollout: self.own.clone(),
            host: LIAR.parse()?,
            at: StepRef { phase: 0, step: 0 },
            direction: Direction::Do,
            attempt: 1,
        };
        let mut poisoned = wire::Hello::from(hello(LIAR, 9)?);
        poisoned.last_report = 1 << 40;
        poisoned.labels = labels(&[("role", "evil"), ("poison", POISON), (POISON, "poison")]);
        poisoned.agent_version = POISON.chars().take(20).collect();
        self.agent = match Agent::begin(self.channel.clone(), poisoned).await {
            Ok(agent) => agent,
            // Not taken at all is as good.
            Err(_) => session(&self.channel, 9).await?,
        };
        let facts = vec![
            Fact::Note {
                name: POISON.into(),
                value: POISON.into(),
            },
            Fact::State {
                name: POISON.into(),
                digest: Digest::of(b"x"),
                text: POISON.into(),
            },
            Fact::Healthy { url: POISON.into() },
        ];
        let ok = ReportBody::Finished {
            key: first.clone(),
            outcome: StepOutcome::Ok {
                changed: true,
                summary: POISON.into(),
            },
            facts: facts.clone(),
            took: Period(1),
            signatures: vec![],
        };
        self.agent
            .report(ReportBody::Started { key: first.clone() })
            .await;
        self.agent.report(ok).await;
        // It is its own step: this is believed, and the next one is ordered.
        let next = loop {
            let order = self.agent.ordered().await?.into_order(LIAR.parse()?)?;
            // In a new session the first one is said again.
            if order.key != first {
                break order;
            }
        };
        ensure!(next.key.at.step == 1, "ordered {}", next.key);
        let failed = ReportBody::Finished {
            key: next.key.clone(),
            outcome: StepOutcome::Failed(Failure {
                cause: Cause::Step,
                message: POISON.into(),
                hint: Some(POISON.into()),
                last_lines: vec![POISON.into(); 3],
                changed: false,
            }),
            facts,
            took: Period(1),
            signatures: vec![],
        };
        self.agent
            .report(ReportBody::Started { key: next.key })
            .await;
        self.agent.report(failed).await;
        let own = self.own.to_string();
        self.serve(&own).await?;
        let declined = submit(&self.cluster, "declined", "evil", false)?;
        self.serve(&declined).await?;
        let unknown = submit(&self.cluster, "unknown", "evil", false)?;
        self.serve(&unknown).await?;
        let known = self.cluster.requester().rollout(&own)?.to_string();
        if !known.contains("FORGED") {
            bail!("the poison is nowhere, so that nothing is shown by its absence");
        }
        self.what_people_see(&[&own, &declined, &unknown])
    }

    /// Answers whatever comes with poison, until a rollout has ended: what it is told to undo is
    /// undone, what is called `declined` is declined, and of other steps it does not know.
    async fn serve(&mut self, rollout: &str) -> Result<()> {
        let poison = || POISON.to_owned();
        let note = || Fact::Note {
            name: poison(),
            value: poison(),
        };
        for _ in 0..600 {
            let body = match self.agent.next_within(Duration::from_millis(100)).await {
                None => None,
                Some(message) => match message.map_err(anyhow::Error::from)? {
                    down::Message::Order(order) => {
                        let key = order.into_order(LIAR.parse()?)?.key;
                        let outcome = match key.direction {
                            Direction::Undo => StepOutcome::Ok {
                                changed: true,
                                summary: poison(),
                            },
                            _ => StepOutcome::Unknown { why: poison() },
                        };
                        Some(ReportBody::Finished {
                            key,
                            outcome,
                            facts: vec![note()],
                            took: Period(1),
                            signatures: vec![],
                        })
                    }
                    down::Message::Survey(survey) => Some(ReportBody::Surveyed {
                        rollout: survey.into_parts()?.0,
                        state: vec![note()],
                    }),
                    down::Message::Offer(offer) => {
                        let (rollout, plan, ..) = offer.into_parts()?;
                        self.seen += 1;
                        let refusal = |at| Refusal {
                            at,
                            reason: poison(),
                        };
                        let at = StepRef { phase: 0, step: 0 };
                        Some(if self.seen == 1 {
                            ReportBody::Declined {
                                rollout,
                                refusals: vec![refusal(None), refusal(Some(at))],
                            }
                        } else {
                            ReportBody::Consented {
                                round: 0,
                                rollout,
                                plan,
                                state: vec![note()],
                            }
                        })
                    }
                    _ => continue,
                },
            };
            match body {
                Some(body) => self.agent.report(body).await,
                None if self.cluster.requester().ended(rollout)?.is_ok() => return Ok(()),
                None => {}
            }
        }
        bail!("{rollout} does not end")
    }

    fn what_people_see(&mut self, rollouts: &[&str]) -> Result<()> {
        let operator = self.cluster.requester();
        let mut shown: BTreeMap<String, String> = BTreeMap::new();
        let mut commands: Vec<Vec<&str>> = vec![vec!["hosts"], vec!["history"], vec!["status"]];
        for rollout in rollouts {
            commands.push(vec!["status", rollout]);
            commands.push(vec!["logs", rollout]);
            for format in ["html", "markdown", "json"] {
                commands.push(vec!["report", rollout, "--format", format]);
            }
        }
        for command in 0..4 {
            commands.push([&commands[command][..], &["--output", "json"]].concat());
        }
        for command in &commands {
            let said = operator.run(command)?;
            shown.insert(command.join(" "), said.stdout + &said.stderr);
        }
        let log = fs::read_to_string(self.cluster.controller_log())?;
        shown.insert("the controller's log".into(), log);
        let mut poisoned = 0;
        for (name, text) in &shown {
            poisoned += usize::from(text.contains("FORGED"));
            let hides = |c: char| matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            let raw = |c: char| (c.is_control() && !matches!(c, '\n' | '\t')) || hides(c);
            if let Some(at) = text.find(raw) {
                let near: String = text[at..].chars().take(20).collect();
                self.said
                    .wrong
                    .push(format!("{name}: raw {}", near.escape_debug()));
            }
            // Output has lines, and in HTML a line's end is nothing but white space.
            let has_lines = name.starts_with("logs") || name.contains("html");
            let forged = |line: &str| line.trim_start().starts_with("FORGED");
            if !has_lines && text.lines().any(forged) {
                self.said
                    .wrong
                    .push(format!("{name}: a line of the host's own"));
            }
            if name.contains("html")
                && (text.contains("<script>alert") || text.contains("<img src=x"))
            {
                self.said
                    .wrong
                    .push(format!("{name}: markup of the host's own"));
            }
        }
        ensure!(
            poisoned >= 5,
            "only {poisoned} outputs show what the host said"
        );
        Ok(())
    }
}
