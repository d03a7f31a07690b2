use lockstep_proto::values::{ByteSize, Period};

use super::*;
use crate::testing::Host;

fn argv(argv: &[&str]) -> Vec<String> {
    argv.iter().map(|&argument| argument.to_owned()).collect()
}

fn command_of(of: &[&str]) -> Command {
    let env = std::collections::BTreeMap::new();
    Command {
        argv: argv(of),
        dir: None,
        env,
        exit: 0,
        matches: None,
        within: None,
    }
}

async fn apply(act: &impl Act, cx: &Context) -> Result<Done, Failure> {
    act.apply(cx, &Value::Null).await
}

#[test]
fn the_kernels_table_of_sockets_is_read() {
    let rest = "00000000:00000000 00:00000000 00000000     0        0";
    let line = format!("   0: 0100007F:1F90 00000000:0000 0A {rest} 31337 1");
    let found = parse_listener(&line).unwrap();
    assert_eq!((found.port, found.inode), (8080, 31337));
    assert_eq!(found.address.to_string(), "127.0.0.1");
    let (local, none) = ("00000000000000000000000001000000", "0".repeat(32));
    let line = format!("   0: {local}:0050 {none}:0000 0A {rest} 5 1");
    assert_eq!(parse_listener(&line).unwrap().address.to_string(), "::1");
    assert_eq!(parse_listener(&line.replace(" 0A ", " 01 ")), None);
}

/// A table that must not be read to its end.
struct Endless;

impl std::io::Read for Endless {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        panic!("the answer had been read")
    }
}

#[test]
fn the_table_of_sockets_is_read_as_far_as_the_answer() {
    use std::io::Read as _;
    let line = |port, state| {
        let rest = "00000000:00000000 00:00000000 00000000     0        0";
        format!("   0: 0100007F:{port:04X} 00000000:0000 {state} {rest} {port} 1\n")
    };
    let heading = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt\n";
    let text = [heading, &line(81, "0A"), &line(80, "01"), &line(80, "0A")].concat();
    let table = BufReader::new(text.as_bytes().chain(Endless));
    let found = find_listener(table, 80).unwrap().unwrap();
    assert_eq!((found.port, found.inode), (80, 80));
    assert_eq!(find_listener(text.as_bytes(), 82).unwrap(), None);
}

#[tokio::test]
async fn an_open_port_is_found_and_its_holder_where_it_is_in_the_way() {
    let host = Host::new();
    let cx = host.context();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let open = Port {
        port,
        expect: PortState::Open,
    };
    let refused = Port {
        port,
        expect: PortState::Refused,
    };
    // To find the holder takes a look at all that every process has open.
    let done = apply(&open, &cx).await.unwrap();
    assert_eq!(done.summary, format!("port {port} is open on 127.0.0.1"));
    let unmet = apply(&refused, &cx).await.unwrap_err();
    assert_eq!(unmet.cause, Cause::CheckUnmet);
    let holder = format!("process {}", std::process::id());
    assert!(unmet.message.contains(&holder), "{}", unmet.message);
    let address = Address(format!("localhost:{port}"));
    assert!(holder_of(&address).is_some());
    drop(listener);
    assert!(apply(&open, &cx).await.is_err());
    assert!(apply(&refused, &cx).await.is_ok());
    let done = apply(
        &Tcp {
            address: address.clone(),
            expect: PortState::Refused,
            within: None,
        },
        &cx,
    )
    .await;
    assert_eq!(done.unwrap().facts, [Fact::Refused { address: address.0 }]);
}

#[tokio::test]
async fn a_check_that_is_not_met_says_so_before_it_counts() {
    let host = Host::new();
    let cx = host.context();
    let check = Process {
        name: "no-such-process-anywhere".into(),
        expect: ProcessState::Running,
    };
    let seen = check.probe(&cx).await.unwrap();
    assert!(
        matches!(&seen, Probe::Unmet(unmet) if unmet.cause == Cause::CheckUnmet),
        "{seen:?}"
    );
}

#[tokio::test]
async fn processes_are_found_by_name_and_zombies_do_not_count() {
    let host = Host::new();
    let cx = host.context();
    let program = host.path().join("a-program-with-a-long-name");
    fs::copy("/bin/sleep", &program).unwrap();
    let mut child = std::process::Command::new(&program)
        .arg("60")
        .spawn()
        .unwrap();
    let name = "a-program-with-a-long-name".to_owned();
    let running = Process {
        name: name.clone(),
        expect: ProcessState::Running,
    };
    let absent = Process {
        name,
        expect: ProcessState::Absent,
    };
    assert!(apply(&running, &cx).await.is_ok());
    assert!(apply(&absent, &cx).await.is_err());
    child.kill().unwrap();
    // Killed, not yet waited for.
    while !is_zombie(child.id().cast_signed()) {
        sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(apply(&absent, &cx).await.is_ok());
    child.wait().unwrap();
}

#[tokio::test]
async fn free_space_is_held_against_the_minimum() {
    let host = Host::new();
    let cx = host.context();
    let path = host.path().to_string_lossy().into_owned();
    assert!(
        apply(
            &Disk {
                path: path.clone(),
                free: ByteSize(1)
            },
            &cx
        )
        .await
        .is_ok()
    );
    let failed = apply(
        &Disk {
            path,
            free: ByteSize(1 << 60),
        },
        &cx,
    )
    .await
    .unwrap_err();
    assert_eq!(failed.cause, Cause::CheckUnmet);
    assert!(
        failed.message.contains("1048576.0 TiB wanted"),
        "{}",
        failed.message
    );
    assert!(
        apply(
            &Disk {
                path: "/no/such/path".into(),
                free: ByteSize(1)
            },
            &cx
        )
        .await
        .is_err()
    );
    assert_eq!(human(1536), "1.5 KiB");
}

#[tokio::test]
async fn a_command_is_run_again_until_it_is_met() {
    let host = Host::new();
    let cx = host.context();
    let file = host.path().join("ready");
    let path = file.to_str().unwrap();
    let check = Command {
        within: Some(Period::seconds(20)),
        ..command_of(&["test", "-e", path])
    };
    assert!(matches!(check.probe(&cx).await.unwrap(), Probe::Unmet(_)));
    let (done, ()) = tokio::join!(apply(&check, &cx), async {
        sleep(std::time::Duration::from_millis(500)).await;
        fs::write(&file, "").unwrap();
    });
    assert!(!done.unwrap().changed);
    let failed = apply(&command_of(&["test", "-e", "/no/such/file"]), &cx)
        .await
        .unwrap_err();
    assert_eq!(
        (failed.cause, failed.message.as_str()),
        (Cause::CheckUnmet, "test exited with 1, not 0")
    );
}

#[tokio::test]
async fn a_command_within_an_application_runs_as_its_user() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut host = Host::new();
    std::os::unix::fs::chown(host.path(), Some(65534), None).unwrap();
    let app = crate::config::App {
        root: host.path().to_owned(),
        user: Some("nobody".into()),
        env: [("COLOR".to_owned(), "app".to_owned())].into(),
    };
    host.config.apps.insert("web".into(), app);
    let check = Command {
        dir: Some(host.path().to_str().unwrap().to_owned()),
        matches: Some("(?s)COLOR=app.*USER=nobody|(?s)USER=nobody.*COLOR=app".into()),
        ..command_of(&["env"])
    };
    apply(&check, &host.context()).await.unwrap();
}
