//! What keeps an agent from starting, and what `check` and `journal verify` find before.

use super::session::ALLOW_RUN;
use crate::support::{Controller, Host, epoch, wait_for};

#[tokio::test]
async fn a_second_agent_on_the_same_state_does_not_start() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, "");
    host.start();
    let _session = controller.accept(epoch(1), 0).await;
    let second = host.command("run").output().unwrap();
    assert_eq!(second.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another agent"));
}

/// No restart mends it: the service is not to be started again and again.
#[tokio::test]
async fn the_state_of_another_domain_is_an_error_of_the_configuration() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, "");
    host.start();
    drop(controller.accept(epoch(1), 0).await);
    assert_eq!(host.stop(), Some(0));
    host.move_to(&controller, "other.org");
    let found = host.command("check").output().unwrap();
    assert_eq!(found.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&found.stderr).contains("belongs to the domain"));
    let refused = host.command("run").output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    for word in ["example.org", "other.org", "state_dir"] {
        assert!(said.contains(word), "`{word}`: {said}");
    }
    let unit = include_str!("../../../deploy/systemd/lockstep-agent.service");
    assert!(unit.contains("\nRestartPreventExitStatus=2\n"));
}

#[tokio::test]
async fn a_broken_journal_is_left_alone_and_said() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, "");
    host.start();
    drop(controller.accept(epoch(1), 0).await);
    wait_for("epoch", || {
        let length = std::fs::metadata(host.path("state/journal")).ok()?.len();
        (length > 150).then_some(())
    })
    .await;
    host.kill();
    let mut journal = std::fs::read(host.path("state/journal")).unwrap();
    journal[60] ^= 1;
    std::fs::write(host.path("state/journal"), &journal).unwrap();
    host.start();
    wait_for("quarantine", || {
        host.log().contains("quarantined").then_some(())
    })
    .await;
    assert_eq!(host.stop(), Some(0));
    assert_eq!(std::fs::read(host.path("state/journal")).unwrap(), journal);
}

#[tokio::test]
async fn check_says_what_is_allowed_and_what_is_wrong() {
    let controller = Controller::start().await;
    let host = Host::new(&controller, ALLOW_RUN);
    let fine = host.command("check").output().unwrap();
    let text = String::from_utf8(fine.stdout).unwrap();
    let errors = String::from_utf8(fine.stderr).unwrap();
    assert_eq!(fine.status.code(), Some(0), "{errors}");
    let says = |action: &str| {
        text.lines()
            .find(|line| line.contains(action))
            .unwrap()
            .to_owned()
    };
    assert!(says("exec.run").ends_with(" allowed"), "{text}");
    assert!(says("postgres.backup").ends_with("not allowed"), "{text}");
    assert!(says("check.disk").contains("only looks"), "{text}");
    let open = |name: &str, mode: u32| {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(host.path(name), mode).unwrap();
    };
    open("agent.key", 0o644);
    let wrong = host.command("check").output().unwrap();
    assert_eq!(wrong.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("chmod 0600"));
    open("policy.toml", 0o666);
    assert_eq!(
        host.command("check").output().unwrap().status.code(),
        Some(2)
    );
}

#[tokio::test]
async fn what_others_can_change_or_read_is_found_and_keeps_the_agent_from_starting() {
    use std::os::unix::fs::PermissionsExt as _;
    let controller = Controller::start().await;
    let host = Host::new(&controller, ALLOW_RUN);
    for (name, mode, well) in [
        ("agent.key", 0o644, 0o600),
        ("agent.toml", 0o666, 0o600),
        ("policy.toml", 0o666, 0o600),
        ("", 0o777, 0o700),
    ] {
        let set = |mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(host.path(name), mode).unwrap();
        };
        set(mode);
        let check = host.command("check").output().unwrap();
        assert!(matches!(check.status.code(), Some(1 | 2)), "{name}");
        let run = host.command("run").output().unwrap();
        assert_eq!(run.status.code(), Some(2), "{name}");
        let said = String::from_utf8_lossy(&run.stderr).into_owned();
        assert!(said.contains("chmod"), "{name}: {said}");
        set(well);
    }
    let fine = host.command("check").output().unwrap();
    assert_eq!(fine.status.code(), Some(0), "{fine:?}");
}

#[tokio::test]
async fn check_finds_what_cannot_work() {
    let controller = Controller::start().await;
    let host = Host::new(&controller, "");
    let text = std::fs::read_to_string(&host.config).unwrap();
    let port = format!("localhost:{}", controller.address.port());
    for address in [
        "localhost",
        "127.0.0.1",
        "localhost:0",
        "::1",
        "a b:1",
        "https://x:1",
    ] {
        std::fs::write(&host.config, text.replace(&port, address)).unwrap();
        for command in ["check", "run"] {
            let refused = host.command(command).output().unwrap();
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert_eq!(refused.status.code(), Some(2), "{address}: {said}");
            assert!(said.contains("`controller`"), "{said}");
        }
    }
    for (more, words) in [
        (
            "[postgres.foo]\nhost = '/run'\nuser = 'x'\npassword = 'nosuch'\n",
            "[postgres.foo]: there is no secret `nosuch`",
        ),
        (
            "[postgres.foo]\nhost = '/run'\nuser = 'x'\nos_user = 'no-such-user'\n",
            "[postgres.foo]: there is no user `no-such-user`",
        ),
        (
            "[services.foo]\nargv = ['/no/such/program']\n",
            "[services.foo]: `/no/such/program` is not there",
        ),
        (
            "[services.foo]\nargv = ['/bin/true']\ndir = '/nodir'\nuser = 'no-such-user'\n",
            "[services.foo]: there is no user `no-such-user`",
        ),
        (
            "[services.foo]\nargv = ['/bin/true']\ndir = '/nodir'\n",
            "cannot run in /nodir",
        ),
    ] {
        std::fs::write(&host.config, format!("{text}{more}")).unwrap();
        let found = host.command("check").output().unwrap();
        let said = String::from_utf8_lossy(&found.stderr).into_owned();
        assert_eq!(found.status.code(), Some(1), "{more}: {said}");
        assert!(said.contains(words), "{words}: {said}");
    }
    // What a release brings may come later.
    let later = "[apps.web]\nroot = '/srv/web'\n\
                 [services.web]\nargv = ['bin/serve']\ndir = '/srv/web/current'\n";
    std::fs::write(&host.config, format!("{text}{later}")).unwrap();
    let fine = host.command("check").output().unwrap();
    assert_eq!(fine.status.code(), Some(0), "{fine:?}");
}

#[tokio::test]
async fn check_finds_a_controller_ca_that_is_none() {
    let controller = Controller::start().await;
    let host = Host::new(&controller, "");
    let ca = host.path("ca.pem");
    for (pem, words) in [
        (
            std::fs::read_to_string(host.path("agent.pem")).unwrap(),
            "issues none",
        ),
        (controller.agents_issuer().to_owned(), "own certificate"),
    ] {
        std::fs::write(&ca, pem).unwrap();
        let found = host.command("check").output().unwrap();
        let said = String::from_utf8_lossy(&found.stderr).into_owned();
        assert_eq!(found.status.code(), Some(1), "{words}: {said}");
        assert!(said.contains(words), "{words}: {said}");
    }
}

/// Certificate and key are the link's to write, and what is on the host is rolled back by exec.
#[tokio::test]
async fn whatever_the_link_does_to_certificate_and_key_exec_starts() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, "");
    host.start();
    drop(controller.accept(epoch(1), 0).await);
    assert_eq!(host.stop(), Some(0));
    let starts = async |what: &str| {
        let socket = host.path("run/exec.sock");
        let _ = std::fs::remove_file(&socket);
        let mut exec = host.command("exec").spawn().unwrap();
        wait_for("exec, or its end", || {
            (socket.exists() || exec.try_wait().unwrap().is_some()).then_some(())
        })
        .await;
        assert!(exec.try_wait().unwrap().is_none(), "{what}");
        exec.kill().unwrap();
        exec.wait().unwrap();
    };
    host.move_to(&controller, "other.org");
    starts("a certificate of another domain").await;
    let open = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(host.path("agent.key"), open).unwrap();
    starts("a key that others can read").await;
    let link = host.command("link").output().unwrap();
    assert_eq!(link.status.code(), Some(2));
    std::fs::write(host.path("agent.pem"), "none").unwrap();
    starts("no certificate").await;
    // Before it has a journal it has to be told where it belongs.
    std::fs::remove_dir_all(host.path("state")).unwrap();
    let refused = host.command("exec").output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
}
