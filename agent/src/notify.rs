//! Tells systemd how the agent is, as sd_notify(3) does.

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends `READY=1`, `STATUS=...` and the like. Without systemd it does nothing, and it never
/// fails anything: it is for people who run `systemctl status`.
pub(crate) fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    if let Err(error) = send(path.as_encoded_bytes(), state) {
        tracing::debug!(%error, "systemd cannot be told");
    }
}

fn send(path: &[u8], state: &str) -> std::io::Result<()> {
    let address = match path.split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_sockets_are_reached() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let named = UnixDatagram::bind(&path).unwrap();
        let name = format!("lockstep-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let unnamed = UnixDatagram::bind_addr(&address).unwrap();
        send(path.as_os_str().as_encoded_bytes(), "READY=1").unwrap();
        send(format!("@{name}").as_bytes(), "STATUS=x").unwrap();
        let mut buffer = [0; 64];
        let length = named.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"READY=1");
        let length = unnamed.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"STATUS=x");
    }
}
