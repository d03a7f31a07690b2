//! Targets
pub struct Target { pub name: &'static str, pub run: fn(&[u8]) }
pub static TARGETS: &[Target] = &[];
pub fn find(name: &str) -> Option<&'static Target> { TARGETS.iter().find(|t| t.name == name) }
