use std::time::Duration;

use lockstep_proto::ids::{BootId, Digest, Epoch, HostId, InstanceId, RolloutId};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Report, ReportBody};
use lockstep_proto::values::Timestamp;
use lockstep_proto::wire::{Hello, PROTOCOL_VERSIONS, Welcome};
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::exec::{Inbound, LogPiece, Outbound};

const SOON: Duration = Duration::from_secs(20);

fn host() -> HostId {
    "app-1".parse().unwrap()
}

fn hello() -> Hello {
    Hello {
        versions: PROTOCOL_VERSIONS,
        host: host(),
        instance: InstanceId::from_random([1; 8]),
        boot: BootId::from_bytes([2; 8]),
        highest_epoch: Epoch { counter: 3, id: 4 },
        last_report: 5,
        labels: [("role".to_owned(), "app".to_owned())].into(),
        agent_version: "1".into(),
        held_rollout: None,
        acknowledged: 4,
    }
}

fn welcome() -> Welcome {
    Welcome {
        version: 1,
        epoch: Epoch { counter: 3, id: 4 },
        clock: Timestamp(9),
        acknowledged: 5,
        earlier: 0,
    }
}

fn report(number: u64) -> Outbound {
    let body = ReportBody::Surveyed {
        rollout: RolloutId::from_random([7; 6]),
        // Large, for the kernel holds some, too.
        state: vec![Fact::Note {
            name: "n".into(),
            value: "x".repeat(20_000),
        }],
    };
    let head = None;
    Outbound::Report(Box::new(Report { number, body, head }))
}

/// Both ends, with the test as the link on one side and as exec on the other.
struct Ends {
    link: mpsc::Sender<Inbound>,
    exec: mpsc::Receiver<Inbound>,
    logs: mpsc::Sender<LogPiece>,
    pieces: mpsc::Receiver<LogPiece>,
    stop: CancellationToken,
    dir: tempfile::TempDir,
}

impl Ends {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exec.sock");
        let own = rustix::process::geteuid().as_raw();
        let listening = Listening::bind(&path, own, host()).unwrap();
        let ((to_exec, exec), (link, from)) = (mpsc::channel(8), mpsc::channel(8));
        let ((logs, from_exec), (to_link, pieces)) = (mpsc::channel(8), mpsc::channel(8));
        let stop = CancellationToken::new();
        tokio::task::spawn_local(listening.serve(to_exec, from_exec, stop.clone()));
        let stopped = stop.clone();
        tokio::task::spawn_local(async move { relay(&path, from, to_link, stopped).await });
        Self {
            link,
            exec,
            logs,
            pieces,
            stop,
            dir,
        }
    }

    async fn heard(&mut self) -> Inbound {
        timeout(SOON, self.exec.recv()).await.unwrap().unwrap()
    }

    /// Begins a session; what each side has of it.
    async fn connect(&mut self) -> (mpsc::Sender<Outbound>, mpsc::Receiver<Outbound>) {
        let (outbox, said) = mpsc::channel(2);
        let welcome = welcome();
        self.link
            .send(Inbound::Connected { welcome, outbox })
            .await
            .unwrap();
        loop {
            if let Inbound::Connected {
                welcome: heard,
                outbox,
            } = self.heard().await
            {
                assert_eq!(heard, self::welcome());
                return (outbox, said);
            }
        }
    }
}

async fn local(test: impl Future<Output = ()>) {
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn link_and_exec_hear_each_other_as_in_one_process() {
    local(async {
        let mut ends = Ends::start();
        let (reply, words) = oneshot::channel();
        ends.link.send(Inbound::Dial(reply)).await.unwrap();
        let Inbound::Dial(asked) = ends.heard().await else {
            panic!("not a dial");
        };
        asked.send(hello()).unwrap();
        assert_eq!(timeout(SOON, words).await.unwrap().unwrap(), hello());

        let (outbox, mut said) = ends.connect().await;
        let digest = Digest::of(b"a plan");
        let plan = vec![7; MAX_PLAN_BYTES];
        ends.link
            .send(Inbound::Plan(digest, Ok(plan.clone())))
            .await
            .unwrap();
        assert!(matches!(ends.heard().await, Inbound::Plan(d, Ok(p)) if d == digest && p == plan));
        outbox.send(Outbound::Fetch(digest)).await.unwrap();
        let fetch = timeout(SOON, said.recv()).await.unwrap();
        assert!(matches!(fetch, Some(Outbound::Fetch(d)) if d == digest));
        ends.link.send(Inbound::Acknowledged(5)).await.unwrap();
        assert!(matches!(ends.heard().await, Inbound::Acknowledged(5)));
        ends.stop.cancel();
    })
    .await;
}

#[tokio::test]
async fn a_slow_network_holds_up_reports_and_nothing_else() {
    local(async {
        let mut ends = Ends::start();
        let (outbox, mut said) = ends.connect().await;
        // Nobody reads what goes up, far more than all channels on the way hold.
        let sending = tokio::task::spawn_local(async move {
            for number in 1..=100 {
                outbox.send(report(number)).await.unwrap();
            }
        });
        for number in 1..=200 {
            ends.link.send(Inbound::Acknowledged(number)).await.unwrap();
            assert!(matches!(ends.heard().await, Inbound::Acknowledged(n) if n == number));
        }
        assert!(!sending.is_finished());
        for number in 1..=100 {
            match timeout(SOON, said.recv()).await.unwrap() {
                Some(Outbound::Report(report)) => assert_eq!(report.number, number),
                other => panic!("{other:?}"),
            }
        }
        ends.stop.cancel();
    })
    .await;
}

#[tokio::test]
async fn what_was_said_in_an_ended_session_does_not_come_up_in_the_next() {
    local(async {
        let mut ends = Ends::start();
        let (outbox, said) = ends.connect().await;
        for number in 1..=8 {
            outbox.send(report(number)).await.unwrap();
        }
        drop(said);
        ends.link.send(Inbound::Disconnected).await.unwrap();
        let (outbox, mut said) = ends.connect().await;
        outbox.send(report(9)).await.unwrap();
        match timeout(SOON, said.recv()).await.unwrap() {
            Some(Outbound::Report(report)) => assert_eq!(report.number, 9),
            other => panic!("{other:?}"),
        }
        let piece = LogPiece {
            key: "ro_010203040506.0.0.do.1@app-1".parse().unwrap(),
            offset: 3,
            data: vec![1, 2],
            progress: Some((500, "half".into())),
        };
        ends.logs.send(piece.clone()).await.unwrap();
        assert_eq!(
            timeout(SOON, ends.pieces.recv()).await.unwrap(),
            Some(piece)
        );
        ends.stop.cancel();
    })
    .await;
}

#[tokio::test]
async fn exec_outlives_a_link_that_dies_or_says_nonsense() {
    local(async {
        let mut ends = Ends::start();
        let _session = ends.connect().await;
        let path = ends.dir.path().join("exec.sock");
        for nonsense in [&b"\xff\xff\xff\xff"[..], b"\x02\0\0\0\xff\xff", b"\0\0\0\0"] {
            // It takes the place of the link that was there, which comes back.
            let mut stream = UnixStream::connect(&path).await.unwrap();
            stream.write_all(nonsense).await.unwrap();
            assert!(matches!(ends.heard().await, Inbound::Disconnected));
            let mut closed = [0];
            let read = tokio::io::AsyncReadExt::read(&mut stream, &mut closed);
            let read = timeout(SOON, read).await.unwrap();
            assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        }
        // The link comes back by itself.
        loop {
            let (reply, _words) = oneshot::channel();
            ends.link.send(Inbound::Dial(reply)).await.unwrap();
            let heard = timeout(Duration::from_millis(200), ends.exec.recv()).await;
            if matches!(heard, Ok(Some(Inbound::Dial(_)))) {
                break;
            }
        }
        ends.stop.cancel();
    })
    .await;
}

#[tokio::test]
async fn nobody_but_the_links_user_is_heard() {
    local(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exec.sock");
        let other = rustix::process::geteuid().as_raw() + 1;
        let listening = Listening::bind(&path, other, host()).unwrap();
        let (to_exec, mut exec) = mpsc::channel(8);
        let (_logs, from_exec) = mpsc::channel(8);
        let stop = CancellationToken::new();
        tokio::task::spawn_local(listening.serve(to_exec, from_exec, stop.clone()));
        let mut stream = UnixStream::connect(&path).await.unwrap();
        let _ = stream.write_all(b"\x02\0\0\0\x0a\0").await;
        let mut closed = [0];
        let read = tokio::io::AsyncReadExt::read(&mut stream, &mut closed);
        let read = timeout(SOON, read).await.unwrap();
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        assert!(exec.try_recv().is_err());
        stop.cancel();
    })
    .await;
}
