//! Output of steps, as agents send it: bounded, lossy, and told apart from what is durable.
//!
//! ```text
//! STATE/logs/<rollout>/<host>/<phase>.<step>.<direction>.<attempt>.log
//! a file is frames: offset in the step's output (8 bytes), length (4 bytes), data
//! ```
//!
//! Offsets tell what is missing and what came twice, so that an agent may begin again after a
//! reconnect. A frame without data ends what an agent had to say; a gap before it was dropped.
//! What is read is made harmless first: a terminal never sees what a step printed as it stands.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use lockstep_proto::ids::{HostId, RolloutId, StepKey, StepRef};
use lockstep_proto::shown::is_shown;
use lockstep_proto::wire::CHUNK;
use tokio::sync::broadcast;

/// What is kept of one attempt's output, in bytes. More than that nobody reads here; the host
/// keeps its own.
pub(crate) const MAX_STEP: u64 = 4 << 20;

/// What is kept of one host in one rollout, in bytes: an agent that invents attempts cannot fill
/// the disk.
pub(crate) const MAX_HOST: u64 = 64 << 20;

/// Announcements that a follower may be behind before it looks at every file again.
const FOLLOWER_LAG: usize = 1024;

const FRAME_HEADER: usize = 12;

/// The directory of logs.
#[derive(Debug, Clone)]
pub(crate) struct Logs {
    dir: PathBuf,
    followed: Arc<Mutex<HashMap<RolloutId, broadcast::Sender<StepKey>>>>,
    /// What hosts with open files have left, so that it is the same for all their streams.
    rooms: Arc<Mutex<HashMap<(RolloutId, HostId), Weak<AtomicU64>>>>,
}

impl Logs {
    /// Opens the directory, or makes it.
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        make_directory(&dir)?;
        Ok(Self {
            dir,
            followed: Arc::default(),
            rooms: Arc::default(),
        })
    }

    /// Announces every file of a rollout that grows from now on.
    pub(crate) fn follow(&self, rollout: &RolloutId) -> broadcast::Receiver<StepKey> {
        let mut followed = self.followed();
        // Where nothing grows any more, nobody else finds out that the followers are gone.
        followed.retain(|_, sender| sender.receiver_count() > 0);
        let sender = followed.entry(rollout.clone());
        let sender = sender.or_insert_with(|| broadcast::Sender::new(FOLLOWER_LAG));
        sender.subscribe()
    }

    /// A writer for one attempt's output, which goes on where the last one ended.
    pub(crate) fn writer(&self, key: &StepKey) -> io::Result<Writer> {
        let host = self.host_dir(&key.rollout, &key.host);
        make_directory(&host)?;
        let room = self.room(key, &host)?;
        let mut options = OpenOptions::new();
        let options = options.read(true).append(true).create(true).mode(0o600);
        let mut file = options.open(self.path(key))?;
        let end = whole_frames(&mut file)?;
        // A frame that was torn by a crash would hide those after it.
        file.set_len(end.position)?;
        Ok(Writer {
            file,
            next: end.next,
            room,
            full: false,
            kept: 0,
            changed: false,
            key: key.clone(),
            logs: self.clone(),
        })
    }

    /// The attempts of a rollout that have output, in the order of hosts and steps.
    pub(crate) fn keys(
        &self,
        rollout: &RolloutId,
        host: Option<&HostId>,
        step: Option<StepRef>,
    ) -> io::Result<Vec<StepKey>> {
        let hosts = match host {
            Some(host) => vec![host.to_string()],
            None => names(&self.dir.join(rollout.as_str()))?,
        };
        let mut keys = Vec::new();
        for host in hosts {
            for name in names(&self.dir.join(rollout.as_str()).join(&host))? {
                let Some(attempt) = name.strip_suffix(".log") else {
                    continue;
                };
                if let Ok(key) = format!("{rollout}.{attempt}@{host}").parse::<StepKey>() {
                    keys.push(key);
                }
            }
        }
        keys.retain(|key| step.is_none_or(|step| key.at == step));
        keys.sort();
        Ok(keys)
    }

    /// Reads one attempt's output from its beginning.
    pub(crate) fn reader(&self, key: &StepKey) -> Reader {
        Reader {
            path: self.path(key),
            position: 0,
            next: 0,
            line: Vec::new(),
        }
    }

    fn host_dir(&self, rollout: &RolloutId, host: &HostId) -> PathBuf {
        self.dir.join(rollout.as_str()).join(host.as_str())
    }

    fn path(&self, key: &StepKey) -> PathBuf {
        let StepKey {
            rollout,
            host,
            at,
            direction,
            attempt,
        } = key;
        let name = format!("{at}.{direction}.{attempt}.log");
        self.host_dir(rollout, host).join(name)
    }

    /// What a host has left in a rollout.
    fn room(&self, key: &StepKey, dir: &Path) -> io::Result<Arc<AtomicU64>> {
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        rooms.retain(|_, room| room.strong_count() > 0);
        let of = (key.rollout.clone(), key.host.clone());
        if let Some(room) = rooms.get(&of).and_then(Weak::upgrade) {
            return Ok(room);
        }
        let mut used = 0;
        for entry in fs::read_dir(dir)? {
            used += entry?.metadata()?.len();
        }
        let room = Arc::new(AtomicU64::new(MAX_HOST.saturating_sub(used)));
        rooms.insert(of, Arc::downgrade(&room));
        Ok(room)
    }

    fn announce(&self, key: &StepKey) {
        let mut followed = self.followed();
        if let Some(sender) = followed.get(&key.rollout)
            && sender.send(key.clone()).is_err()
        {
            followed.remove(&key.rollout);
        }
    }

    fn followed(&self) -> MutexGuard<'_, HashMap<RolloutId, broadcast::Sender<StepKey>>> {
        // Nothing that holds the lock leaves the map half changed.
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Appends one attempt's output.
#[derive(Debug)]
pub(crate) struct Writer {
    file: File,
    /// The offset after the last byte that is stored, or known to be dropped.
    next: u64,
    /// What the host has left.
    room: Arc<AtomicU64>,
    /// There was no room for a piece: what follows would only tear holes.
    full: bool,
    kept: u64,
    changed: bool,
    key: StepKey,
    logs: Logs,
}

impl Writer {
    /// Appends a piece of output that begins at an offset. What is there already is skipped, and
    /// what there is no room for is dropped.
    pub(crate) fn append(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let known = usize::try_from(self.next.saturating_sub(offset)).unwrap_or(usize::MAX);
        let Some(fresh) = data.get(known..).filter(|fresh| !fresh.is_empty()) else {
            return Ok(());
        };
        let offset = offset.max(self.next);
        let size = (FRAME_HEADER + fresh.len()) as u64;
        self.changed = true;
        // Another stream may write the same file.
        let stored = self.file.metadata()?.len();
        let take = |room: u64| room.checked_sub(size);
        self.full |= stored + size > MAX_STEP
            || self
                .room
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
                .is_err();
        if self.full {
            return Ok(());
        }
        self.write_frame(offset, fresh)?;
        self.kept += fresh.len() as u64;
        self.next = offset + fresh.len() as u64;
        self.logs.announce(&self.key);
        Ok(())
    }

    /// How many bytes this writer has kept.
    pub(crate) fn kept(&self) -> u64 {
        self.kept
    }

    /// Writes down where the output ends, so that readers see what was dropped before.
    pub(crate) fn finish(&mut self, end: u64) -> io::Result<()> {
        if std::mem::take(&mut self.changed) && end > self.next {
            self.write_frame(end, &[])?;
            self.next = end;
            self.logs.announce(&self.key);
        }
        Ok(())
    }

    /// One write for a frame, so that it is appended as a whole.
    fn write_frame(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let length = u32::try_from(data.len()).expect("a chunk is far smaller than 4 GiB");
        let mut frame = Vec::with_capacity(FRAME_HEADER + data.len());
        frame.extend_from_slice(&offset.to_be_bytes());
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(data);
        self.file.write_all(&frame)
    }
}

/// Reads one attempt's output as harmless text, in whole lines.
#[derive(Debug)]
pub(crate) struct Reader {
    /// Opened anew for each reading: who follows 10,000 hosts does not hold as many files open.
    path: PathBuf,
    position: u64,
    next: u64,
    /// The beginning of a line whose end has not come yet.
    line: Vec<u8>,
}

impl Reader {
    /// The next lines, up to about 64 KiB; empty if nothing new is there.
    pub(crate) fn lines(&mut self) -> io::Result<String> {
        let mut text = String::new();
        let mut file = File::open(&self.path)?;
        while text.len() < CHUNK {
            let Some(frame) = read_frame(&mut file, self.position)? else {
                break;
            };
            self.position += frame.size();
            if frame.offset > self.next {
                self.end_line(&mut text);
                let dropped = frame.offset - self.next;
                let note = format!("[{dropped} bytes of output were dropped here]\n");
                text.push_str(&note);
            }
            let known = usize::try_from(self.next.saturating_sub(frame.offset));
            let known = known.unwrap_or(usize::MAX);
            let fresh = frame.data.get(known..).unwrap_or_default();
            self.next = self.next.max(frame.offset + frame.data.len() as u64);
            self.line.extend_from_slice(fresh);
            if let Some(last) = self.line.iter().rposition(|byte| *byte == b'\n') {
                let rest = self.line.split_off(last + 1);
                text.push_str(&harmless(&String::from_utf8_lossy(&self.line)));
                self.line = rest;
            }
            if self.line.len() >= CHUNK {
                self.end_line(&mut text);
            }
        }
        Ok(text)
    }

    /// What is left of the last line, for when nothing more will come.
    pub(crate) fn rest(&mut self) -> String {
        let mut text = String::new();
        self.end_line(&mut text);
        text
    }

    fn end_line(&mut self, text: &mut String) {
        if !self.line.is_empty() {
            text.push_str(&harmless(&String::from_utf8_lossy(&self.line)));
            text.push('\n');
            self.line.clear();
        }
    }
}

/// Text without anything that a terminal or a reader could be misled by: escape sequences,
/// control characters but tab and newline, and characters that reorder or hide others.
pub(crate) fn harmless(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '\u{1b}' => skip_escape(&mut chars),
            '\n' | '\t' => out.push(char),
            _ if is_shown(char) => out.push(char),
            _ => {}
        }
    }
    out
}

/// Skips the rest of an escape sequence: colours and cursor movements (`[` up to a letter),
/// titles and links (`]` up to a bell or `ESC \`), or one character.
fn skip_escape(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) {
    match chars.peek() {
        Some('[') => {
            chars.next();
            while let Some(char) = chars.next_if(|char| *char != '\n') {
                if ('@'..='~').contains(&char) {
                    break;
                }
            }
        }
        Some(']') => {
            while let Some(char) = chars.next_if(|char| *char != '\n') {
                if char == '\u{7}' {
                    break;
                }
                if char == '\u{1b}' {
                    chars.next_if_eq(&'\\');
                    break;
                }
            }
        }
        Some(char) if !char.is_control() => {
            chars.next();
        }
        _ => {}
    }
}

struct Frame {
    offset: u64,
    data: Vec<u8>,
}

impl Frame {
    fn size(&self) -> u64 {
        (FRAME_HEADER + self.data.len()) as u64
    }
}

struct End {
    position: u64,
    next: u64,
}

fn whole_frames(file: &mut File) -> io::Result<End> {
    let mut end = End {
        position: 0,
        next: 0,
    };
    while let Some(frame) = read_frame(file, end.position)? {
        end.position += frame.size();
        end.next = end.next.max(frame.offset + frame.data.len() as u64);
    }
    Ok(end)
}

/// The frame at a position; none if no whole one is there.
fn read_frame(file: &mut File, position: u64) -> io::Result<Option<Frame>> {
    file.seek(SeekFrom::Start(position))?;
    let mut header = [0; FRAME_HEADER];
    if !read_whole(file, &mut header)? {
        return Ok(None);
    }
    let (offset, length) = header.split_at(8);
    let offset = u64::from_be_bytes(offset.try_into().expect("eight bytes"));
    let length = u32::from_be_bytes(length.try_into().expect("four bytes"));
    // Writers never make larger ones: what says so is damaged.
    if length as usize > CHUNK || offset > u64::MAX / 2 {
        return Ok(None);
    }
    let mut data = vec![0; length as usize];
    Ok(read_whole(file, &mut data)?.then_some(Frame { offset, data }))
}

fn read_whole(file: &mut File, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default()));
    names.collect()
}

fn make_directory(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> StepKey {
        "ro_010203040506.1.2.do.1@app-1".parse().unwrap()
    }

    fn logs() -> (tempfile::TempDir, Logs) {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path().to_owned()).unwrap();
        (dir, logs)
    }

    fn text(logs: &Logs) -> String {
        let mut reader = logs.reader(&key());
        let mut all = String::new();
        loop {
            let text = reader.lines().unwrap();
            if text.is_empty() {
                return all + &reader.rest();
            }
            all += &text;
        }
    }

    #[test]
    fn what_comes_twice_is_kept_once_and_gaps_are_counted() {
        let (_dir, logs) = logs();
        let mut writer = logs.writer(&key()).unwrap();
        writer.append(0, b"one\ntw").unwrap();
        writer.append(3, b"\ntwo\nth").unwrap();
        assert_eq!(writer.kept(), 10);
        drop(writer);
        // The agent connects again, and is not sure what has arrived.
        let mut writer = logs.writer(&key()).unwrap();
        writer.append(8, b"three\n").unwrap();
        writer.append(24, b"four\n").unwrap();
        writer.finish(40).unwrap();
        assert_eq!(
            text(&logs),
            "one\ntwo\nthree\n[10 bytes of output were dropped here]\nfour\n\
             [11 bytes of output were dropped here]\n"
        );
    }

    #[test]
    fn output_is_bounded() {
        let (_dir, logs) = logs();
        let mut writer = logs.writer(&key()).unwrap();
        let mut line = vec![b'x'; 65_535];
        line.push(b'\n');
        for number in 0..100_u64 {
            writer.append(number * 65_536, &line).unwrap();
        }
        writer.finish(100 * 65_536).unwrap();
        assert!(writer.kept() <= MAX_STEP);
        let size = fs::metadata(logs.path(&key())).unwrap().len();
        assert!(size <= MAX_STEP + 12, "{size}");
        let text = text(&logs);
        assert!(
            text.ends_with("bytes of output were dropped here]\n"),
            "{}",
            text.len()
        );
    }

    #[test]
    fn several_streams_have_no_more_room_than_one() {
        let (_dir, logs) = logs();
        let mut writers: Vec<_> = (0..3).map(|_| logs.writer(&key()).unwrap()).collect();
        let line = [b'x'; 65_536];
        for writer in &mut writers {
            for number in 0..100 {
                writer.append(number * 65_536, &line).unwrap();
            }
        }
        let size = fs::metadata(logs.path(&key())).unwrap().len();
        assert!(size <= MAX_STEP, "{size}");
        let mut other = key();
        other.attempt += 1;
        let room = logs.writer(&other).unwrap().room;
        assert_eq!(room.load(Ordering::Relaxed), MAX_HOST - size);
        drop((writers, room));
        let room = logs.writer(&other).unwrap().room;
        assert_eq!(
            room.load(Ordering::Relaxed),
            MAX_HOST - size,
            "counted anew"
        );
    }

    #[test]
    fn a_torn_frame_does_not_hide_what_follows() {
        let (_dir, logs) = logs();
        let mut writer = logs.writer(&key()).unwrap();
        writer.append(0, b"one\n").unwrap();
        writer.append(4, b"two\n").unwrap();
        drop(writer);
        let path = logs.path(&key());
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(fs::metadata(&path).unwrap().len() - 2)
            .unwrap();
        let mut writer = logs.writer(&key()).unwrap();
        writer.append(4, b"two\n").unwrap();
        writer.append(8, b"three\n").unwrap();
        assert_eq!(text(&logs), "one\ntwo\nthree\n");
    }

    #[test]
    fn a_terminal_is_not_misled() {
        for (given, shown) in [
            ("\u{1b}[31mred\u{1b}[0m\n", "red\n"),
            ("\u{1b}]0;title\u{7}text", "text"),
            ("\u{1b}]8;;http://x\u{1b}\\link", "link"),
            ("a\rb\u{8}c\u{0}", "abc"),
            ("\u{9b}31mx", "31mx"),
            ("abc\u{202e}def", "abcdef"),
            ("a\u{200b}b\u{2064}c\u{feff}", "abc"),
            ("tab\tstays", "tab\tstays"),
            ("\u{1b}", ""),
        ] {
            assert_eq!(harmless(given), shown, "{given:?}");
        }
    }

    #[test]
    fn keys_are_listed_by_host_and_step() {
        let (_dir, logs) = logs();
        let keys = ["1.10.do.1@app-1", "1.2.do.1@app-1", "1.2.do.2@db-1"];
        for key in keys {
            let key = format!("ro_010203040506.{key}").parse().unwrap();
            logs.writer(&key).unwrap().append(0, b"x").unwrap();
        }
        let rollout = key().rollout;
        let found = |host: Option<&str>, step| {
            let host = host.map(|host| host.parse().unwrap());
            let keys = logs.keys(&rollout, host.as_ref(), step).unwrap();
            keys.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            found(None, None),
            [
                "ro_010203040506.1.2.do.1@app-1",
                "ro_010203040506.1.10.do.1@app-1",
                "ro_010203040506.1.2.do.2@db-1"
            ]
        );
        let step = StepRef { phase: 1, step: 2 };
        assert_eq!(found(Some("db-1"), Some(step)).len(), 1);
        assert!(found(Some("db-2"), None).is_empty());
    }

    #[test]
    fn a_rollout_without_followers_is_forgotten() {
        let (_dir, logs) = logs();
        for number in 0..100 {
            // Read once, and nothing of it grows afterwards.
            drop(logs.follow(&RolloutId::from_random([number; 6])));
        }
        let mut follower = logs.follow(&key().rollout);
        let _another = logs.follow(&RolloutId::from_random([200; 6]));
        assert_eq!(logs.followed().len(), 2);
        logs.writer(&key()).unwrap().append(0, b"x").unwrap();
        assert_eq!(follower.try_recv().unwrap(), key());
    }
}
