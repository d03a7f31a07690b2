//! `lockstep-agent journal verify`: whether a journal is whole, while no agent runs on it.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufReader, Read as _};
use std::path::Path;

use lockstep_proto::json;

use super::head::{Head, Known};
use super::{
    Broken, FRAME, Frame, Hash, JournalError, Link, MAX_RECORD, Record, Scan, ScanError, chain,
    genesis, io_error, judge,
};

/// What is found in a journal.
#[derive(Debug)]
pub(crate) struct Verified {
    /// The first record's content: format, domain and instance, as it is now; none if there is no
    /// such record.
    pub(crate) opened: Option<Record>,
    /// The last record that is what was written, with all before it; number 0 if there is none.
    pub(crate) last: (u64, Hash),
    /// What the head file names; none if it is missing or broken.
    pub(crate) head: Option<(u64, Hash)>,
    /// Bytes beyond the last record that nobody relied on, if the journal is whole. The agent cuts
    /// them at its next start.
    pub(crate) torn: u64,
    /// What is wrong; none if the journal is whole.
    pub(crate) broken: Option<Broken>,
}

/// Reads the journal of a state directory, and changes nothing. The caller holds the state lock.
pub(crate) fn verify(dir: &Path) -> Result<Verified, JournalError> {
    walk(dir, |_, _| {})
}

/// The same, with every record that is whole; for that, the agent may be running.
pub(crate) fn walk(
    dir: &Path,
    mut visit: impl FnMut(Link, Record),
) -> Result<Verified, JournalError> {
    let (path, head_path) = (dir.join("journal"), dir.join("head"));
    let head = Head::read(&head_path).map_err(io_error("read", &head_path))?;
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(lost(head)),
        Err(error) => return Err(io_error("open", &path)(error)),
    };
    let size = file.metadata().map_err(io_error("read", &path))?.len();
    let mut opened = None;
    let scan = Scan::run(&file, head.number(), &mut |link, record: Record| {
        match (&record, &mut opened) {
            // From here on it is another installation's.
            (Record::Anchored { instance: new, .. }, Some(Record::Opened { instance, .. })) => {
                instance.clone_from(new);
            }
            _ => _ = opened.get_or_insert_with(|| record.clone()),
        }
        visit(link, record);
    });
    let (last, torn, broken) = match scan {
        Ok(scan) => {
            let broken = judge(head, &scan, size).err();
            // An agent that runs may have written more since its size was asked.
            let torn = size.saturating_sub(scan.length);
            ((scan.number, scan.hash), torn, broken)
        }
        // The chain holds up to it, but what it says is unknown.
        Err(ScanError::Newer(number, hash, source)) => {
            let broken = Broken {
                record: Some(number),
                why: format!(
                    "record {number} is of a kind that this release does not know: {source}"
                ),
            };
            ((number, hash), 0, Some(broken))
        }
        Err(error @ ScanError::Io(_)) => return Err(error.locate(&path)),
    };
    Ok(Verified {
        opened: opened.filter(|record| matches!(record, Record::Opened { .. })),
        last,
        head: head.newest,
        torn,
        broken,
    })
}

/// The domain that the journal of a state directory belongs to, by its first record alone; none if
/// there is no such record, or it is broken.
pub(crate) fn domain(dir: &Path) -> Option<String> {
    let mut reader = BufReader::new(File::open(dir.join("journal")).ok()?);
    let mut frame = [0; FRAME];
    reader.read_exact(&mut frame).ok()?;
    let frame = Frame::split(&frame);
    let mut payload = vec![0; Some(frame.size()).filter(|size| *size <= MAX_RECORD)?];
    reader.read_exact(&mut payload).ok()?;
    let whole = chain(genesis(), frame.length, frame.number, &payload) == frame.hash;
    match json::read(&payload).ok().filter(|_| whole)? {
        Record::Opened { domain, .. } => Some(domain),
        _ => None,
    }
}

/// Every record that is whole, while an agent may be running.
#[cfg(feature = "faults")]
pub(crate) fn look(dir: &Path, mut visit: impl FnMut(Record)) -> io::Result<()> {
    let file = File::open(dir.join("journal"))?;
    let scan = Scan::run(&file, None, &mut |_, record| visit(record));
    scan.map(|_| ())
        .map_err(|_| io::Error::other("the journal cannot be read"))
}

/// There is a head, and nothing else.
fn lost(head: Known) -> Verified {
    Verified {
        opened: None,
        last: (0, genesis()),
        head: head.newest,
        torn: 0,
        broken: Some(Broken::lost()),
    }
}

impl Verified {
    /// The same for people.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "{name:<14}{value}");
        };
        if let Some(Record::Opened {
            format,
            domain,
            instance,
        }) = &self.opened
        {
            line("journal", &instance.to_string());
            line("domain", domain);
            line("format", &format.to_string());
        }
        let (number, hash) = self.last;
        line("records", &number.to_string());
        line("last", &format!("{number} sha256:{}", hex::encode(hash)));
        let head = self.head.map_or_else(
            || "not readable".to_owned(),
            |(number, hash)| format!("{number} sha256:{}", hex::encode(hash)),
        );
        line("head", &head);
        let whole = match &self.broken {
            None if self.torn > 0 => format!(
                "yes; {} bytes after it were relied on by nobody, and are cut at the next start",
                self.torn
            ),
            None => "yes".to_owned(),
            Some(Broken {
                record: Some(record),
                ..
            }) => format!("no, broken from record {record} on"),
            Some(_) => "no".to_owned(),
        };
        line("whole", &whole);
        text
    }
}
