//! A mail server that keeps what it gets: enough SMTP for one sender.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;

/// A mail server on loopback. Its thread ends with the process.
#[derive(Debug)]
pub struct Mailbox {
    /// Where it listens.
    pub port: u16,
    messages: Arc<Mutex<Vec<String>>>,
}

impl Mailbox {
    /// Opens it on a free port.
    pub fn open() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let messages = Arc::new(Mutex::new(vec![]));
        let kept = Arc::clone(&messages);
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                // A sender that breaks off has sent nothing.
                let _ = receive(&connection, &kept);
            }
        });
        Ok(Self { port, messages })
    }

    /// What came, heads included.
    pub fn messages(&self) -> Vec<String> {
        self.messages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The subjects of what came.
    pub fn subjects(&self) -> Vec<String> {
        let subject = |message: &String| {
            let line = message.lines().find(|line| line.starts_with("Subject: "));
            line.map(|line| line["Subject: ".len()..].to_owned())
        };
        self.messages().iter().filter_map(subject).collect()
    }
}

fn receive(connection: &TcpStream, kept: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(connection).lines();
    let mut writer = connection;
    let mut say = |line: &str| writer.write_all(format!("{line}\r\n").as_bytes());
    say("220 mailbox")?;
    while let Some(line) = lines.next() {
        let line = line?;
        let command = line
            .split([' ', ':'])
            .next()
            .unwrap_or_default()
            .to_ascii_uppercase();
        match command.as_str() {
            "DATA" => {
                say("354 go on")?;
                let mut message = String::new();
                for line in lines.by_ref() {
                    let line = line?;
                    if line == "." {
                        break;
                    }
                    message.push_str(line.strip_prefix('.').unwrap_or(&line));
                    message.push('\n');
                }
                kept.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(message);
                say("250 kept")?;
            }
            "QUIT" => return say("221 bye"),
            "EHLO" | "HELO" | "MAIL" | "RCPT" | "RSET" | "NOOP" => say("250 ok")?,
            _ => say("502 not here")?,
        }
    }
    Ok(())
}
