//! Writes first inputs into a directory, one below it for each target: `seeds DIR`.

use std::path::{Path, PathBuf};

use lockstep_proto::ids::Digest;

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let into: PathBuf = std::env::args_os().nth(1).unwrap_or_default().into();
    for (target, bytes) in lockstep_fuzz::seeds::all(&root) {
        let directory = into.join(target);
        std::fs::create_dir_all(&directory)?;
        std::fs::write(directory.join(Digest::of(&bytes).short()), &bytes)?;
    }
    Ok(())
}
