//! Users of the operating system, as `/etc/passwd` and `/etc/group` name them.

use std::path::PathBuf;

use lockstep_proto::report::{Cause, Failure};

use crate::step::failure;

/// A user of the operating system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    /// The name.
    pub(crate) name: String,
    /// The number.
    pub(crate) uid: u32,
    /// The main group's number.
    pub(crate) gid: u32,
    /// The home directory.
    pub(crate) home: PathBuf,
}

impl User {
    /// Looks a user up by name.
    pub(crate) fn find(name: &str) -> Result<Self, Failure> {
        let found = Self::passwd()?.into_iter().find(|user| user.name == name);
        found.ok_or_else(|| Failure {
            hint: Some(format!(
                "create it, or correct `user` or `owner` where it says {name}"
            )),
            ..failure(
                Cause::Host,
                format!("there is no user `{name}` in /etc/passwd"),
            )
        })
    }

    /// Whoever the agent runs as; `None` if `/etc/passwd` does not know it.
    pub(crate) fn current() -> Option<Self> {
        let uid = rustix::process::geteuid().as_raw();
        Self::passwd()
            .ok()?
            .into_iter()
            .find(|user| user.uid == uid)
    }

    /// Whether the agent runs as this user.
    pub(crate) fn is_self(&self) -> bool {
        self.uid == rustix::process::geteuid().as_raw()
    }

    /// Fails unless the agent may run programs as this user.
    pub(crate) fn may_be_taken(&self) -> Result<(), Failure> {
        if self.is_self() || rustix::process::geteuid().is_root() {
            return Ok(());
        }
        let own = Self::current().map_or_else(|| "another user".to_owned(), |user| user.name);
        Err(Failure {
            hint: Some(format!("run the agent as root or as {}", self.name)),
            ..failure(
                Cause::Host,
                format!("the agent runs as {own} and cannot act as {}", self.name),
            )
        })
    }

    /// All groups of the user, the main one first.
    pub(crate) fn groups(&self) -> Result<Vec<u32>, Failure> {
        let mut groups = vec![self.gid];
        for line in read("/etc/group")?.lines() {
            let mut fields = line.split(':');
            let (_, _, gid, members) = (fields.next(), fields.next(), fields.next(), fields.next());
            let member = members
                .unwrap_or("")
                .split(',')
                .any(|member| member == self.name);
            if let (true, Some(Ok(gid))) = (member, gid.map(str::parse))
                && gid != self.gid
            {
                groups.push(gid);
            }
        }
        Ok(groups)
    }

    fn passwd() -> Result<Vec<Self>, Failure> {
        Ok(read("/etc/passwd")?
            .lines()
            .filter_map(Self::parse)
            .collect())
    }

    /// Reads `name:password:uid:gid:comment:home:shell`.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(':');
        let (name, _) = (fields.next()?, fields.next()?);
        let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let home = PathBuf::from(fields.nth(1)?);
        (!name.is_empty()).then(|| Self {
            name: name.to_owned(),
            uid,
            gid,
            home,
        })
    }
}

fn read(path: &str) -> Result<String, Failure> {
    let bytes = std::fs::read(path)
        .map_err(|error| failure(Cause::Host, format!("cannot read {path}: {error}")))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_read_from_passwd() {
        let user = User::parse("www:x:33:34:web, data:/var/www:/usr/sbin/nologin").unwrap();
        assert_eq!((user.name.as_str(), user.uid, user.gid), ("www", 33, 34));
        assert_eq!(user.home, PathBuf::from("/var/www"));
        assert_eq!(User::parse("broken:x:zero:0::/:"), None);
        assert_eq!(User::find("root").unwrap().uid, 0);
        let missing = User::find("no-such-user-here").unwrap_err();
        assert_eq!(missing.cause, Cause::Host);
        assert!(missing.hint.is_some());
    }
}
