//! Where a copy of a backup goes.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::{Deserialize, Deserializer, Serialize, de};

/// Where a copy of a backup goes: a directory of the host, or a command that takes it elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum CopyTo {
    /// A directory, or a mounted volume.
    Directory(String),
    /// A command for each file of the backup.
    Command(CopyCommand),
}

/// Commands that take the files of a backup elsewhere and give them back. `{file}` in an argument stands for the file's path, `{id}` for the backup's id, `{name}` for the file's name in the backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CopyCommand {
    /// Program and arguments; the file is its standard input, too.
    pub command: Vec<String>,
    /// Program and arguments of one that prints the copy: it is hashed, and must be equal.
    pub read_back: Vec<String>,
}

impl<'de> Deserialize<'de> for CopyTo {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = CopyTo;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a directory, or `{command: [...], read_back: [...]}`")
            }
            fn visit_str<E: de::Error>(self, directory: &str) -> Result<CopyTo, E> {
                Ok(CopyTo::Directory(directory.to_owned()))
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<CopyTo, A::Error> {
                CopyCommand::deserialize(MapAccessDeserializer::new(map)).map(CopyTo::Command)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_goes_to_a_directory_or_through_a_command() {
        for text in [
            r#""/backups""#,
            r#"{"command":["rsync","{file}","b:/{id}"],"read_back":["ssh","b","cat","/{id}"]}"#,
        ] {
            let read: CopyTo = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&read).unwrap(), text);
        }
        for text in [
            "7",
            r#"{"command":["rsync"]}"#,
            r#"{"command":[],"read_back":[],"x":1}"#,
        ] {
            serde_json::from_str::<CopyTo>(text).expect_err(text);
        }
    }
}
