//! What an operator may do, as the certificate says it.
//!
//! Roles stand in the subject's attribute `role` (2.5.4.72), as words with commas between them.
//! Releases before roles know nothing of that attribute, and take such a certificate as they took
//! others.

use std::fmt;
use std::str::FromStr;

/// The attribute of a subject that holds the roles: X.520's `role`.
pub(crate) const ATTRIBUTE: [u64; 4] = [2, 5, 4, 72];

/// What an operator may do. None of them includes another, but that all of them read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Role {
    /// Reads
    Viewer,
    /// Submits plans, and asks what they would do
    Author,
    /// Decides at gates, and signs reports
    Approver,
    /// Pauses, resumes, resolves, cancels, rolls back, closes
    Operator,
    /// Makes tokens, suspends, forgets hosts
    Admin,
}

impl Role {
    /// All of them, as they are listed.
    pub(crate) const ALL: [Self; 5] = [
        Self::Viewer,
        Self::Author,
        Self::Approver,
        Self::Operator,
        Self::Admin,
    ];

    /// The word in certificates and on the command line.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Author => "author",
            Self::Approver => "approver",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is no role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NoRole;

impl FromStr for Role {
    type Err = NoRole;

    fn from_str(text: &str) -> Result<Self, NoRole> {
        let found = Self::ALL.into_iter().find(|role| role.as_str() == text);
        found.ok_or(NoRole)
    }
}

/// A set of roles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Roles(u8);

impl Roles {
    /// Every role: whoever has one of them may read.
    pub(crate) const ANY: Self = Self::of(&Role::ALL);

    /// What certificates without roles may do, which releases before roles made: all but what
    /// came with roles, and forgetting hosts.
    pub(crate) const BEFORE_ROLES: Self =
        Self::of(&[Role::Viewer, Role::Author, Role::Approver, Role::Operator]);

    /// The set of these.
    pub(crate) const fn of(roles: &[Role]) -> Self {
        let mut bits = 0;
        let mut next = 0;
        while next < roles.len() {
            bits |= 1 << roles[next] as u8;
            next += 1;
        }
        Self(bits)
    }

    /// Reads the attribute's value. A word that this release does not know grants nothing.
    pub(crate) fn read(text: &str) -> Self {
        let words = text.split(',').map(str::trim);
        let roles: Vec<Role> = words.filter_map(|word| word.parse().ok()).collect();
        Self::of(&roles)
    }

    /// Whether one of these is among the others.
    pub(crate) fn meets(self, others: Self) -> bool {
        self.0 & others.0 != 0
    }

    /// Both together.
    pub(crate) fn with(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    fn iter(self) -> impl Iterator<Item = Role> {
        let has = move |role: &Role| self.meets(Self::of(&[*role]));
        Role::ALL.into_iter().filter(has)
    }
}

/// The attribute's value: the words, with commas between them.
impl fmt::Display for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, role) in self.iter().enumerate() {
            if place > 0 {
                f.write_str(",")?;
            }
            f.write_str(role.as_str())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_read_as_they_are_written() {
        for bits in 0..1 << Role::ALL.len() {
            let roles = Roles(bits);
            assert_eq!(Roles::read(&roles.to_string()), roles, "{roles}");
        }
        let roles = Roles::read("viewer, pope,admin");
        assert_eq!(roles, Roles::of(&[Role::Viewer, Role::Admin]));
        assert_eq!(Roles::read(""), Roles::default());
        assert!(!Roles::BEFORE_ROLES.meets(Roles::of(&[Role::Admin])));
        assert!(!Roles::default().meets(Roles::ANY));
    }
}
