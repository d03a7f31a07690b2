//! Compiles the .proto files with protox, so that nobody has to install protoc.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files = [
        "lockstep/agent/v1/agent.proto",
        "lockstep/control/v1/control.proto",
    ];
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    if std::env::var_os("CARGO_FEATURE_GRPC").is_some() {
        let set = protox::compile(files, ["."])?;
        // Payloads as `Bytes`: a fan-out clones a pointer.
        tonic_prost_build::configure().bytes(".").compile_fds(set)?;
    }
    Ok(())
}
