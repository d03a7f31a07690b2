//! Compiles the .proto files with protox, so that nobody has to install protoc, and lists every
//! call in them.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    let mut files = Vec::new();
    find(Path::new("lockstep"), &mut files)?;
    files.sort();
    for file in &files {
        println!("cargo::rerun-if-changed={file}");
    }
    if env::var_os("CARGO_FEATURE_GRPC").is_some() {
        // First, for it also writes an empty file for the messages that it borrows.
        let (within, between): (Vec<_>, Vec<_>) = files
            .iter()
            .partition(|file| file.starts_with("lockstep/host"));
        tonic_prost_build::configure()
            .bytes(".")
            .extern_path(".lockstep.agent.v1", "crate::wire::agent_v1")
            .compile_fds(protox::compile(within, ["."])?)?;
        let set = protox::compile(between, ["."])?;
        let mut calls = String::new();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let (package, service) = (file.package(), service.name());
                    let _ = writeln!(calls, "    \"/{package}.{service}/{}\",", method.name());
                }
            }
        }
        let out = env::var("OUT_DIR")?;
        fs::write(Path::new(&out).join("calls.rs"), format!("&[\n{calls}]\n"))?;
        // Payloads as `Bytes`: a fan-out clones a pointer.
        tonic_prost_build::configure().bytes(".").compile_fds(set)?;
    }
    Ok(())
}

/// Every .proto file below a directory. A directory that gets another file is looked at again.
fn find(directory: &Path, files: &mut Vec<String>) -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={}", directory.display());
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if path
            .extension()
            .is_some_and(|extension| extension == "proto")
        {
            files.push(path.to_str().ok_or("a path that is no text")?.to_owned());
        }
    }
    Ok(())
}
