//! A small HTTP server: `POST /things` makes one, `DELETE /things/7` removes it, any `GET` is fine.
//! It counts what it is asked for in a file of its own.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::Result;

/// The running server; it ends with this process.
pub(super) struct Things {
    pub(super) port: u16,
    there: Arc<Mutex<BTreeSet<u64>>>,
}

impl Things {
    /// Serves on a free port.
    pub(super) fn serve(ledger: &Path) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let there = Arc::new(Mutex::new(BTreeSet::new()));
        let (shared, ledger) = (there.clone(), ledger.to_owned());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (there, ledger) = (shared.clone(), ledger.clone());
                std::thread::spawn(move || {
                    // Who is killed while asking has no use for an answer.
                    let _ = answer(stream, &there, &ledger);
                });
            }
        });
        Ok(Self { port, there })
    }

    /// How many things there are.
    pub(super) fn count(&self) -> usize {
        self.there.lock().expect("no holder panics").len()
    }

    /// Removes all.
    pub(super) fn clear(&self) {
        self.there.lock().expect("no holder panics").clear();
    }
}

fn answer(stream: TcpStream, there: &Mutex<BTreeSet<u64>>, ledger: &PathBuf) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        // Killed before anything was sent: a connection asks for nothing.
        return Ok(());
    }
    let mut length = 0;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? <= 2 {
            break;
        }
        let header = header.to_ascii_lowercase();
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
    }
    std::io::copy(&mut reader.take(length), &mut std::io::sink())?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let id = path
        .rsplit('/')
        .next()
        .and_then(|id| id.parse::<u64>().ok());
    let mut body = "{\"status\": \"healthy\"}".to_owned();
    {
        let mut there = there.lock().expect("no holder panics");
        match (method, id) {
            ("POST", _) => {
                let id = there.last().map_or(1, |last| last + 1);
                there.insert(id);
                body = format!("{{\"id\": {id}}}");
            }
            ("DELETE", Some(id)) => {
                there.remove(&id);
            }
            _ => {}
        }
    }
    let mut file = OpenOptions::new().create(true).append(true).open(ledger)?;
    file.write_all(format!("{method}\n").as_bytes())?;
    let mut stream = stream;
    write!(
        stream,
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    Ok(())
}
