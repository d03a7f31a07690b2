//! Checks of commands: argument lists of programs, never command lines for a shell, not even
//! behind a program that starts another one. And nothing secret among the arguments, where every
//! user of the host can read it.

use super::args::{Args, Path};
use super::finding::Code;
use super::node::Step;

/// Programs that take a command line as text. Lockstep has argument lists only.
const SHELLS: [&str; 15] = [
    "sh",
    "ash",
    "bash",
    "dash",
    "zsh",
    "ksh",
    "mksh",
    "csh",
    "tcsh",
    "fish",
    "su",
    "cmd",
    "cmd.exe",
    "powershell",
    "pwsh",
];

/// A program that starts the one that its arguments name.
struct Wrapper {
    name: &'static str,
    /// Options whose value is the next word, unless it is attached: single letters, and names.
    letters: &'static str,
    names: &'static [&'static str],
    /// Options that make it start a shell, written in the same way.
    shell_letters: &'static str,
    shell_names: &'static [&'static str],
    /// Words before the program that are neither options nor `NAME=value`.
    operands: usize,
}

const fn wrapper(name: &'static str) -> Wrapper {
    Wrapper {
        name,
        letters: "",
        names: &[],
        shell_letters: "",
        shell_names: &[],
        operands: 0,
    }
}

const WRAPPERS: [Wrapper; 14] = [
    Wrapper {
        letters: "uCa",
        names: &["unset", "chdir", "argv0"],
        // One text that env splits into words, as a shell would.
        shell_letters: "S",
        shell_names: &["split-string"],
        ..wrapper("env")
    },
    Wrapper {
        letters: "aCcDghpRrtTUu",
        names: &[
            "auth-type",
            "close-from",
            "login-class",
            "chdir",
            "group",
            "host",
            "prompt",
            "chroot",
            "role",
            "type",
            "command-timeout",
            "other-user",
            "user",
        ],
        shell_letters: "si",
        shell_names: &["shell", "login"],
        ..wrapper("sudo")
    },
    Wrapper {
        letters: "aCu",
        shell_letters: "s",
        ..wrapper("doas")
    },
    Wrapper {
        names: &[
            "ruid",
            "euid",
            "rgid",
            "egid",
            "reuid",
            "regid",
            "groups",
            "inh-caps",
            "ambient-caps",
            "bounding-set",
            "securebits",
            "pdeathsig",
            "ptracer",
            "selinux-label",
            "apparmor-profile",
            "landlock-access",
            "landlock-rule",
            "seccomp-filter",
        ],
        ..wrapper("setpriv")
    },
    // Only with `-u` does it start a program, see `shell`.
    Wrapper {
        letters: "ugGwT",
        names: &["user", "group", "supp-group", "whitelist-environment"],
        shell_letters: "cs",
        shell_names: &["command", "session-command", "shell"],
        ..wrapper("runuser")
    },
    Wrapper {
        letters: "n",
        names: &["adjustment"],
        ..wrapper("nice")
    },
    Wrapper {
        letters: "cn",
        names: &["class", "classdata"],
        ..wrapper("ionice")
    },
    Wrapper {
        letters: "ks",
        names: &["kill-after", "signal"],
        operands: 1,
        ..wrapper("timeout")
    },
    wrapper("busybox"),
    Wrapper {
        letters: "adEILnPs",
        names: &[
            "arg-file",
            "delimiter",
            "max-args",
            "max-procs",
            "max-chars",
            "process-slot-var",
        ],
        ..wrapper("xargs")
    },
    wrapper("nohup"),
    wrapper("setsid"),
    Wrapper {
        letters: "ioe",
        names: &["input", "output", "error"],
        ..wrapper("stdbuf")
    },
    Wrapper {
        names: &["groups", "userspec"],
        operands: 1,
        ..wrapper("chroot")
    },
];

impl Args<'_> {
    /// A program and its arguments.
    pub(super) fn argv(&self, argv: &[String], path: &Path<'_>) {
        let Some(program) = argv.first() else {
            self.report(Code::BadCommand, path, "a command needs a program", "");
            return;
        };
        let item = |index: usize| -> Vec<Step<'_>> {
            let index = Step::Item(index);
            path.iter().copied().chain([index]).collect()
        };
        if program.trim().is_empty() {
            self.report(Code::BadCommand, &item(0), "the program has no name", "");
        } else if let Some(index) = shell(argv) {
            let word = base_name(&argv[index]);
            let message = if SHELLS.contains(&word) {
                format!("`{word}` is a shell, and there is no shell in a plan")
            } else {
                format!("with `{word}`, this starts a shell, and there is no shell in a plan")
            };
            let hint = "name the program itself, each argument an item of the list";
            self.report(Code::BadCommand, &item(index), message, hint);
        } else if argv.len() == 1 && program.contains(' ') {
            let message = format!("`{program}` is one word here, and no command line");
            let hint = "make each argument an item of the list";
            self.report(Code::BadCommand, &item(0), message, hint);
        }
        self.database_tool(argv, path);
        for (index, word) in argv.iter().enumerate() {
            if holds_password(word) {
                let message = "this URL holds a password, and every user of the host sees it";
                let hint = "give it to the program in `env`, from a `secret://`, or in a file";
                self.report(Code::BadUrl, &item(index), message, hint);
            }
        }
    }
}

/// Whether a text holds a URL with a user and a password: `scheme://user:password@host`.
pub(super) fn holds_password(text: &str) -> bool {
    let ends = |c: char| "/?#".contains(c) || c.is_whitespace();
    text.split("://").skip(1).any(|rest| {
        let authority = rest.split(ends).next().unwrap_or_default();
        let user = authority.rsplit_once('@').map(|(user, _)| user);
        user.is_some_and(|user| user.contains(':'))
    })
}

/// The word of a command that makes it one of a shell.
fn shell(argv: &[String]) -> Option<usize> {
    match innermost(argv) {
        Next::Program(at) => SHELLS.contains(&base_name(&argv[at])).then_some(at),
        Next::Shell(at) => Some(at),
        Next::Nothing => None,
    }
}

/// Where the program stands that a command runs in the end, behind those that start others.
pub(super) fn program(argv: &[String]) -> Option<usize> {
    match innermost(argv) {
        Next::Program(at) => Some(at),
        Next::Shell(_) | Next::Nothing => None,
    }
}

/// What a command starts in the end.
fn innermost(argv: &[String]) -> Next {
    let mut at = 0;
    loop {
        let Some(name) = argv.get(at).map(|word| base_name(word)) else {
            return Next::Nothing;
        };
        let Some(wrapper) = WRAPPERS.iter().find(|wrapper| wrapper.name == name) else {
            return Next::Program(at);
        };
        match wrapper.program(&argv[at + 1..]) {
            Next::Program(further) => at += 1 + further,
            Next::Shell(further) => return Next::Shell(at + 1 + further),
            // These start the user's shell if they are told no program.
            Next::Nothing if ["chroot", "runuser"].contains(&name) => return Next::Shell(at),
            Next::Nothing => return Next::Nothing,
        }
    }
}

/// What a wrapper starts.
enum Next {
    /// The program at this position of its arguments.
    Program(usize),
    /// A shell, by the option at this position.
    Shell(usize),
    /// No program.
    Nothing,
}

impl Wrapper {
    /// Reads a wrapper's arguments as getopt does, up to the program.
    fn program(&self, words: &[String]) -> Next {
        let mut at = 0;
        let mut operands = self.operands;
        let mut options = true;
        let mut names_user = false;
        while let Some(word) = words.get(at) {
            if options && word == "--" {
                options = false;
            } else if let Some(option) = word.strip_prefix("--").filter(|_| options) {
                let (name, attached) = match option.split_once('=') {
                    Some((name, _)) => (name, true),
                    None => (option, false),
                };
                // The beginning of a name is enough, if it has no other.
                let is_one_of = |known: &[&str]| known.iter().any(|k| k.starts_with(name));
                if is_one_of(self.shell_names) && !self.names.contains(&name) {
                    return Next::Shell(at);
                }
                let valued = is_one_of(self.names);
                names_user |= valued && "user".starts_with(name);
                at += usize::from(valued && !attached);
            } else if let Some(letters) = word.strip_prefix('-').filter(|_| options) {
                for (position, letter) in letters.char_indices() {
                    if self.shell_letters.contains(letter) {
                        return Next::Shell(at);
                    }
                    if self.letters.contains(letter) {
                        names_user |= letter == 'u';
                        let attached = position + letter.len_utf8() < letters.len();
                        at += usize::from(!attached);
                        break;
                    }
                }
            } else if ["env", "sudo"].contains(&self.name) && word.contains('=') {
                // A variable for the program.
            } else if operands > 0 {
                operands -= 1;
            } else if self.name == "runuser" && !names_user {
                return Next::Nothing;
            } else {
                return Next::Program(at);
            }
            at += 1;
        }
        Next::Nothing
    }
}

pub(super) fn base_name(program: &str) -> &str {
    program.rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(command: &str) -> Option<String> {
        let argv: Vec<String> = command.split(' ').map(str::to_owned).collect();
        shell(&argv).map(|at| argv[at].clone())
    }

    #[test]
    fn a_shell_is_found_behind_programs_that_start_others() {
        for command in [
            "env sh -c x",
            "/usr/bin/env -i A=b -u C --chdir /tmp PATH=/bin /bin/sh -c x",
            "env -- A=b sh",
            "env - sh",
            "sudo -nu app -- sh -c x",
            "sudo --user app --us=app sh",
            "sudo -E A=b sh",
            "doas -u app sh",
            "setpriv --reuid 1000 --clear-groups --inh-caps=-all sh -c x",
            "runuser -u app -- sh -c x",
            "nice -n 10 sh",
            "nice -10 sh",
            "ionice -c 2 -n7 sh",
            "timeout -k 5 --signal=KILL 30s sh -c x",
            "busybox sh -c x",
            "xargs -0 -n 1 -I {} sh -c {}",
            "nohup setsid -w stdbuf -oL -e 0 sh -c x",
            "chroot --userspec=app /srv /bin/sh",
            "sudo env timeout 5 nice busybox sh",
        ] {
            let shell = found(command).unwrap_or_else(|| panic!("nothing in `{command}`"));
            assert_eq!(base_name(&shell), "sh", "{command}");
        }
        for (command, by) in [
            ("env -S x", "-S"),
            ("env -iS x", "-iS"),
            ("env --split-string=x", "--split-string=x"),
            ("sudo -u app -i", "-i"),
            ("sudo --login", "--login"),
            ("runuser -u app -c x", "-c"),
            ("runuser app", "runuser"),
            ("runuser - app", "runuser"),
            ("chroot /srv", "chroot"),
            ("su app -c x", "su"),
        ] {
            assert_eq!(found(command).as_deref(), Some(by), "{command}");
        }
    }

    #[test]
    fn programs_that_only_speak_of_shells_are_none() {
        for command in [
            "pgrep bash",
            "env pgrep -x sh",
            "env -u sh make",
            "env",
            "env SHELL=/bin/sh make",
            "sudo -u sh make",
            "timeout 5 pgrep sh",
            "timeout sh make",
            "nice -n 5 make sh",
            "xargs -I sh rm sh",
            "runuser -u postgres -- psql",
            "runuser --user postgres psql",
            "chroot /bin/sh make",
            "busybox wget x",
            "nohup",
            "make -- sh",
        ] {
            assert_eq!(found(command), None, "{command}");
        }
    }

    #[test]
    fn a_password_in_a_url_is_seen_wherever_it_stands() {
        for text in [
            "postgres://user:pw@host/db",
            "--dsn=postgresql://user:pw@host",
            "a http://x/ https://user:p%40w@host",
            "redis://:pw@host",
        ] {
            assert!(holds_password(text), "{text}");
        }
        for text in [
            "postgres://user@host:5432/db",
            "ssh://git@host/x",
            "http://host:80/a:b@c",
            "http://host:80?mail=a@b.c",
            "user:pw@host",
            "://",
        ] {
            assert!(!holds_password(text), "{text}");
        }
    }
}
