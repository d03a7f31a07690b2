//! Copies that a command takes elsewhere, and another one gives back to be hashed.

use std::path::Path;

use lockstep_proto::action::postgres::CopyCommand;
use lockstep_proto::report::{Cause, Failure};

use super::super::archive::{self, Dir};
use super::super::manifest::{Manifest, blocking};
use super::copies::{differs, expected, files};
use crate::actions::exec;
use crate::process::Program;
use crate::step::{Context, hinted};

/// Refuses what cannot be started, before anything is made to be copied.
pub(super) async fn check_program(cx: &Context, to: &CopyCommand) -> Result<(), Failure> {
    for words in [&to.command, &to.read_back] {
        exec::program(cx, words, None, &std::collections::BTreeMap::new())
            .await?
            .check()?;
    }
    Ok(())
}

/// Sends the files of a backup, its manifest last, and reads them back.
pub(super) async fn send(
    cx: &Context,
    directory: &Path,
    made: &Manifest,
    to: &CopyCommand,
) -> Result<(), Failure> {
    for name in files(made) {
        let (held, file) = (directory.to_owned(), name);
        let open = move || Dir::open(&held)?.file(file);
        let file = blocking("cannot read the backup", open).await?;
        let program = filled(cx, &to.command, directory, made, name).await?;
        program.feed(cx, file.into()).await?;
    }
    check(cx, directory, made, to).await?;
    let program = to.command.join(" ");
    cx.log
        .line(&format!("sent by `{program}`, and read back equal"));
    Ok(())
}

/// Reads the copies back. One that is lost, or not equal, fails by the command's name.
pub(super) async fn check(
    cx: &Context,
    directory: &Path,
    made: &Manifest,
    to: &CopyCommand,
) -> Result<(), Failure> {
    for name in files(made) {
        let expected = expected(directory, made, name).await?;
        let program = filled(cx, &to.read_back, directory, made, name).await?;
        let why = match program.pour(cx, archive::drain).await {
            Ok(found) => match differs(found, expected) {
                None => continue,
                Some(why) => why,
            },
            Err(failed) if failed.cause == Cause::TimedOut => return Err(failed),
            Err(failed) => format!("does not come back: {}", failed.message),
        };
        return Err(hinted(
            Cause::CheckUnmet,
            format!(
                "the copy of {} by `{}` is none: {name} {why}",
                made.id,
                to.command.join(" ")
            ),
            "see whether it reaches its place, and whether `read_back` reads from there",
        ));
    }
    Ok(())
}

/// A command for one file. What is put in begins with a letter or `/`, so that no argument becomes
/// an option, and has no sign that a shell on the other side would take for its own.
async fn filled(
    cx: &Context,
    words: &[String],
    directory: &Path,
    made: &Manifest,
    name: &str,
) -> Result<Program, Failure> {
    let file = directory.join(name).display().to_string();
    let fill = |word: &String| {
        let word = word.replace("{id}", &made.id).replace("{name}", name);
        word.replace("{file}", &file)
    };
    let argv: Vec<String> = words.iter().map(fill).collect();
    exec::program(cx, &argv, None, &std::collections::BTreeMap::new()).await
}
