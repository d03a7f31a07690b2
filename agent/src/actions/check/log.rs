//! What a log gained since the rollout began.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::Path;
use std::time::Duration;

use lockstep_proto::action::check::Log;
use lockstep_proto::report::{Cause, Failure};
use regex::Regex;
use rustix::fs::OFlags;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::{Act, Done, Finding, Probe, until};
use crate::actions::exec::pattern;
use crate::actions::files;
use crate::actions::places::Place;
use crate::config::Config;
use crate::process::head;
use crate::step::{Context, LogMark, failure};

/// Between two looks at a log that is watched.
const PAUSE: Duration = Duration::from_millis(200);

/// The most that is read of a log, in bytes: one that gains more has other troubles.
const MAX_BYTES: u64 = 256 << 20;

/// The longest line that a failure shows, in bytes.
const MAX_SHOWN: usize = 300;

/// A log on the way through its new lines.
struct Reader<'a> {
    config: &'a Config,
    path: &'a Path,
    /// Where the next line begins, and in which file: a rotated log begins anew.
    mark: LogMark,
    read: u64,
}

/// What was found so far.
struct Patterns<'a> {
    deny: Vec<Regex>,
    require: Vec<(&'a str, Regex)>,
    /// Lines that were read.
    lines: u64,
    /// The first line that is forbidden.
    denied: Option<String>,
}

impl Reader<'_> {
    /// Gives every new line to `each`; a last one without its end is left for later, unless this
    /// is the last look.
    fn read(&mut self, last: bool, mut each: impl FnMut(&str)) -> Result<bool, Failure> {
        let failed =
            |error: std::io::Error| files::failed(format!("read {}", self.path.display()), &error);
        let place = match Place::find(self.config, self.path) {
            Ok(place) => place,
            Err(error) if error.is_missing() => return Ok(false),
            Err(error) => return Err(error.failed(&format!("read {}", self.path.display()))),
        };
        let file = files::open(&place.path(), OFlags::empty()).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let inode = Some(metadata.ino());
        if self.mark.inode.is_some() && self.mark.inode != inode {
            // What the old file gained before it was put aside is new too.
            if let Some(old) = self.put_aside() {
                self.lines(old, true, &mut each)?;
            }
            self.mark.size = 0;
        }
        // Shorter than before: it was emptied, and all that is in it is new.
        if metadata.len() < self.mark.size {
            self.mark.size = 0;
        }
        self.mark.inode = inode;
        self.lines(file, last, &mut each)?;
        Ok(true)
    }

    /// The file that the mark is in, which has another name by now: `app.log.1`.
    fn put_aside(&self) -> Option<File> {
        let name = self.path.file_name()?.as_encoded_bytes();
        let directory = Place::find(self.config, self.path.parent()?).ok()?;
        let entries = std::fs::read_dir(directory.path()).ok()?;
        let mut logs = entries.filter_map(Result::ok).filter(|entry| {
            entry.file_name().as_encoded_bytes().starts_with(name)
                && Some(entry.ino()) == self.mark.inode
        });
        let file = files::open(&logs.next()?.path(), OFlags::NOFOLLOW).ok()?;
        // Its name may stand for another file by now.
        let is_same = Some(file.metadata().ok()?.ino()) == self.mark.inode;
        is_same.then_some(file)
    }

    fn lines(
        &mut self,
        file: File,
        last: bool,
        each: &mut impl FnMut(&str),
    ) -> Result<(), Failure> {
        let failed =
            |error: std::io::Error| files::failed(format!("read {}", self.path.display()), &error);
        let mut file = BufReader::new(file);
        file.seek(SeekFrom::Start(self.mark.size)).map_err(failed)?;
        let mut line = vec![];
        loop {
            line.clear();
            // One byte more than may be read, so that no line outgrows the memory unnoticed.
            let mut rest = file.by_ref().take(MAX_BYTES + 1 - self.read);
            let length = rest.read_until(b'\n', &mut line).map_err(failed)?;
            if length == 0 || (!last && !line.ends_with(b"\n")) {
                return Ok(());
            }
            self.mark.size += length as u64;
            self.read += length as u64;
            if self.read > MAX_BYTES {
                let message = format!("{} gained more than {MAX_BYTES} bytes", self.path.display());
                return Err(failure(Cause::CheckUnmet, message));
            }
            each(String::from_utf8_lossy(&line).trim_end());
        }
    }
}

impl<'a> Patterns<'a> {
    fn of(check: &'a Log) -> Result<Self, Failure> {
        let require = check
            .require
            .iter()
            .map(|text| Ok((text.as_str(), pattern(text)?)));
        Ok(Self {
            deny: check
                .deny
                .iter()
                .map(|text| pattern(text))
                .collect::<Result<_, _>>()?,
            require: require.collect::<Result<_, Failure>>()?,
            lines: 0,
            denied: None,
        })
    }

    fn see(&mut self, line: &str) {
        self.lines += 1;
        self.require.retain(|(_, pattern)| !pattern.is_match(line));
        if self.denied.is_none() && self.deny.iter().any(|pattern| pattern.is_match(line)) {
            self.denied = Some(head(line, MAX_SHOWN).to_owned());
        }
    }
}

async fn look(check: &Log, cx: &Context, until: Instant) -> Result<Finding, Failure> {
    let path = Path::new(&check.path);
    let mut reader = Reader {
        config: &cx.config,
        path,
        mark: cx.log_offsets.get(path).copied().unwrap_or_default(),
        read: 0,
    };
    let mut patterns = Patterns::of(check)?;
    loop {
        let last = Instant::now() + PAUSE >= until;
        let there = reader.read(last, |line| patterns.see(line))?;
        if let Some(line) = patterns.denied {
            let words = format!("{} has a forbidden line: {line}", check.path);
            let hint = Some("see the log around that line");
            return Ok(Finding {
                hint,
                ..Finding::new(false, words)
            });
        }
        let all_seen = patterns.require.is_empty();
        // Forbidden lines are waited for to the end; required ones only until they are there.
        let enough = there && all_seen && patterns.deny.is_empty();
        if !(last || enough) {
            sleep(PAUSE).await;
            continue;
        }
        let words = match patterns.require.first() {
            _ if !there => format!("there is no log {}", check.path),
            Some((text, _)) => format!("no new line of {} matches `{text}`", check.path),
            None => format!("{} new lines of {} are clean", patterns.lines, check.path),
        };
        return Ok(Finding::new(there && all_seen, words));
    }
}

impl Act for Log {
    /// Only for dry runs, in which the log has gained nothing yet.
    async fn probe(&self, _cx: &Context) -> Result<Probe, Failure> {
        Ok(if Path::new(&self.path).exists() {
            Probe::Absent(format!(
                "reads what {} gains from the rollout's consent on",
                self.path
            ))
        } else {
            let message = format!("there is no log {}", self.path);
            Probe::Unmet(failure(Cause::CheckUnmet, message))
        })
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        look(self, cx, until(cx, self.watch)).await?.into_done()
    }

    fn describe(&self) -> String {
        match self.watch {
            Some(watch) => format!("watch the log {} for {watch}", self.path),
            None => format!("check the new lines of {}", self.path),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Write as _;
    use std::sync::Arc;

    use lockstep_proto::values::Period;

    use super::*;
    use crate::testing::Host;

    fn check(host: &Host, deny: &[&str], require: &[&str], watch: Option<Period>) -> Log {
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        let path = host.path().join("app.log").to_string_lossy().into_owned();
        Log {
            path,
            deny: texts(deny),
            require: texts(require),
            watch,
        }
    }

    fn context(host: &Host, log: &Log, offset: u64) -> Context {
        let mark = LogMark {
            size: offset,
            inode: None,
        };
        context_at(host, log, mark)
    }

    fn context_at(host: &Host, log: &Log, mark: LogMark) -> Context {
        let offsets = BTreeMap::from([(log.path.clone().into(), mark)]);
        Context {
            log_offsets: Arc::new(offsets),
            ..host.context()
        }
    }

    #[tokio::test]
    async fn only_lines_since_the_rollout_began_count() {
        let host = Host::new();
        let log = check(&host, &["ERROR"], &["started"], None);
        std::fs::write(&log.path, "ERROR old\nINFO started\n").unwrap();
        let apply = async |offset| log.apply(&context(&host, &log, offset), &Value::Null).await;
        assert!(apply(10).await.is_ok());
        let failed = apply(0).await.unwrap_err();
        assert!(
            failed.message.ends_with("forbidden line: ERROR old"),
            "{}",
            failed.message
        );
        // Nothing new: the required line is missing.
        let failed = apply(23).await.unwrap_err();
        assert!(
            failed.message.contains("matches `started`"),
            "{}",
            failed.message
        );
        // Emptied since: all of it is new.
        assert!(apply(500).await.unwrap_err().message.contains("ERROR old"));
    }

    #[tokio::test]
    async fn a_dry_run_does_not_read_the_log() {
        let host = Host::new();
        let log = check(&host, &["secret"], &[], None);
        std::fs::write(&log.path, "an old secret\n").unwrap();
        let cx = Context {
            dry_run: true,
            ..host.context()
        };
        let seen = log.probe(&cx).await.unwrap();
        assert!(
            matches!(&seen, Probe::Absent(text) if !text.contains("secret")),
            "{seen:?}"
        );
        std::fs::remove_file(&log.path).unwrap();
        assert!(matches!(log.probe(&cx).await.unwrap(), Probe::Unmet(_)));
    }

    #[tokio::test]
    async fn a_watched_log_fails_when_the_forbidden_line_comes() {
        let host = Host::new();
        let log = check(&host, &["panic"], &[], Some(Period::seconds(20)));
        std::fs::write(&log.path, "fine\n").unwrap();
        let cx = context(&host, &log, 0);
        let (result, ()) = tokio::join!(log.apply(&cx, &Value::Null), async {
            sleep(Duration::from_millis(500)).await;
            // Rotated, and written in two parts.
            std::fs::rename(&log.path, format!("{}.1", log.path)).unwrap();
            let mut file = File::create(&log.path).unwrap();
            write!(file, "a long line before the pan").unwrap();
            sleep(Duration::from_millis(500)).await;
            writeln!(file, "ic").unwrap();
        });
        assert!(result.unwrap_err().message.ends_with("before the panic"));
    }

    #[tokio::test]
    async fn a_watch_without_forbidden_lines_ends_with_the_required_one() {
        let host = Host::new();
        let log = check(&host, &[], &["ready"], Some(Period::seconds(20)));
        let cx = context(&host, &log, 0);
        let began = Instant::now();
        let (result, ()) = tokio::join!(log.apply(&cx, &Value::Null), async {
            sleep(Duration::from_millis(300)).await;
            std::fs::write(&log.path, "ready\n").unwrap();
        });
        assert!(result.is_ok(), "{result:?}");
        assert!(began.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_log_that_was_rotated_since_is_read_from_its_beginning() {
        let host = Host::new();
        let log = check(&host, &["ERROR"], &[], None);
        std::fs::write(&log.path, "ERROR old\n").unwrap();
        let cx = context_at(&host, &log, LogMark::end_of(Path::new(&log.path)));
        let apply = async || log.apply(&cx, &Value::Null).await;
        assert!(apply().await.is_ok());
        let aside = format!("{}.1", log.path);
        std::fs::rename(&log.path, &aside).unwrap();
        // Longer than the old one was at consent, so that its length tells nothing.
        std::fs::write(&log.path, "ERROR new\nfine, fine, fine\n").unwrap();
        let failed = apply().await.unwrap_err();
        assert!(failed.message.ends_with("ERROR new"), "{}", failed.message);
        // What the old one gained before that counts as well, and not what it had.
        std::fs::write(&log.path, "fine, fine, fine\n").unwrap();
        assert!(apply().await.is_ok());
        let mut old = File::options().append(true).open(&aside).unwrap();
        writeln!(old, "ERROR last").unwrap();
        let failed = apply().await.unwrap_err();
        assert!(failed.message.ends_with("ERROR last"), "{}", failed.message);
        std::fs::remove_file(&aside).unwrap();
        assert!(apply().await.is_ok());
    }

    /// Whoever owns the log's directory wants to have another file read.
    #[tokio::test]
    async fn a_log_that_became_somebodys_link_is_not_read() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let host = Host::new();
        let log = check(&host, &["root:"], &[], None);
        std::fs::write(&log.path, "fine\n").unwrap();
        let cx = context_at(&host, &log, LogMark::end_of(Path::new(&log.path)));
        let shadow = host.path().join("shadow");
        std::fs::write(&shadow, "root:canary\n").unwrap();
        std::fs::remove_file(&log.path).unwrap();
        std::os::unix::fs::symlink(&shadow, &log.path).unwrap();
        let apply = async || log.apply(&cx, &Value::Null).await.unwrap_err();
        std::os::unix::fs::lchown(&log.path, Some(65534), None).unwrap();
        let refused = apply().await;
        assert_eq!(refused.cause, Cause::Refused);
        assert!(!refused.message.contains("canary"), "{refused:?}");
        // One that an administrator has made leads where it should.
        std::os::unix::fs::lchown(&log.path, Some(0), None).unwrap();
        assert!(apply().await.message.contains("canary"));
    }
}
