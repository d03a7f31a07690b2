//! Compiles the .proto files with protox, so that nobody has to install protoc.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files = [
        "lockstep/agent/v1/agent.proto",
        "lockstep/control/v1/control.proto",
    ];
    let of_host = "lockstep/host/v1/host.proto";
    for file in files.into_iter().chain([of_host]) {
        println!("cargo::rerun-if-changed={file}");
    }
    if std::env::var_os("CARGO_FEATURE_GRPC").is_some() {
        // First, for it also writes an empty file for the messages that it borrows.
        tonic_prost_build::configure()
            .bytes(".")
            .extern_path(".lockstep.agent.v1", "crate::wire::agent_v1")
            .compile_fds(protox::compile([of_host], ["."])?)?;
        let set = protox::compile(files, ["."])?;
        // Payloads as `Bytes`: a fan-out clones a pointer.
        tonic_prost_build::configure().bytes(".").compile_fds(set)?;
    }
    Ok(())
}
