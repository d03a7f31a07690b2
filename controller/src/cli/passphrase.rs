//! Passphrases: from a terminal without echo, or from a descriptor. Never from an argument or the
//! environment, which others on the machine can read.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::path::PathBuf;

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::pki::secret_key::Passphrase;

/// The longest passphrase, in bytes.
const LONGEST: u64 = 1024;

/// Where a passphrase comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A person types it.
    Terminal,
    /// The first line of what an open descriptor gives.
    Descriptor(u32),
}

impl Source {
    /// The descriptor that was named, or else the terminal.
    pub(crate) fn of(descriptor: Option<u32>) -> Self {
        descriptor.map_or(Self::Terminal, Self::Descriptor)
    }

    /// Asks for the passphrase of something that is there.
    pub(crate) fn ask(self, what: &str) -> io::Result<Passphrase> {
        match self {
            Self::Terminal => prompt(&format!("passphrase of {what}: ")),
            Self::Descriptor(number) => read(number),
        }
    }

    /// Asks for a new passphrase: people type it twice.
    pub(crate) fn ask_for_new(self, what: &str) -> io::Result<Passphrase> {
        let first = match self {
            Self::Terminal => prompt(&format!("new passphrase of {what}: "))?,
            Self::Descriptor(number) => read(number)?,
        };
        if first.is_empty() {
            return Err(io::Error::other("a passphrase has at least one character"));
        }
        if self == Self::Terminal && prompt("once more: ")? != first {
            return Err(io::Error::other("the two are not the same"));
        }
        Ok(first)
    }
}

fn read(number: u32) -> io::Result<Passphrase> {
    // The same open file, whatever it is: a pipe, a file, a here-string.
    let path = PathBuf::from(format!("/proc/self/fd/{number}"));
    line(&File::open(path)?)
}

fn prompt(question: &str) -> io::Result<Passphrase> {
    let open = OpenOptions::new().read(true).write(true).open("/dev/tty");
    let mut terminal = open.map_err(|_| {
        io::Error::other("there is no terminal to ask on; name a descriptor with --passphrase-fd")
    })?;
    write!(terminal, "{question}")?;
    terminal.flush()?;
    let said = {
        let _quiet = Quiet::new(&terminal)?;
        line(&terminal)
    };
    writeln!(terminal)?;
    said
}

fn line(file: &File) -> io::Result<Passphrase> {
    let mut text = String::new();
    BufReader::new(file.take(LONGEST)).read_line(&mut text)?;
    let length = text.trim_end_matches(['\r', '\n']).len();
    text.truncate(length);
    Ok(Passphrase::new(text))
}

/// A terminal that does not show what is typed, until dropped.
struct Quiet<'a> {
    terminal: &'a File,
    before: Termios,
}

impl<'a> Quiet<'a> {
    fn new(terminal: &'a File) -> io::Result<Self> {
        let before = tcgetattr(terminal)?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        tcsetattr(terminal, OptionalActions::Flush, &quiet)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(self.terminal, OptionalActions::Now, &self.before);
    }
}
