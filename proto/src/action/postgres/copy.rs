//! Where a copy of a backup goes.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::{Deserialize, Deserializer, Serialize, de};

/// Where a copy of a backup goes: a directory of the host, `{command, read_back}` that take it elsewhere and give it back, or an object store: `{store, archive: {put, get}, manifest: {put, get}}`, perhaps with `globals`, `headers` and `ca_file`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum CopyTo {
    /// A directory, or a mounted volume.
    Directory(String),
    /// A command for each file of the backup.
    Command(CopyCommand),
    /// An object store, by requests that were signed beforehand.
    Store(CopyStore),
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

/// An object store such as S3, and presigned requests for each file of the backup. Whoever has such a URL may do what it says, so plans name secrets of the host that hold them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CopyStore {
    /// Where the files go: `https://HOST/PATH/`. Every request must be for something below it.
    pub store: String,
    /// Requests for the archive.
    pub archive: Presigned,
    /// Requests for the manifest.
    pub manifest: Presigned,
    /// Requests for the roles and tablespaces; with `globals: true` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub globals: Option<Presigned>,
    /// Headers of each upload, where the store or the signature asks for some, such as `x-ms-blob-type`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// Certificates of the authorities that may have issued the store's, in a file of the host. Default: those that the host trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<String>,
}

/// Two requests for one file, each a secret of the host that holds a whole URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Presigned {
    /// One that takes the file: `secret://NAME`.
    pub put: String,
    /// One that gives it back: `secret://NAME`. What comes is hashed, and must be equal.
    pub get: String,
}

impl CopyStore {
    /// The requests, each with its key.
    pub fn requests(&self) -> impl Iterator<Item = (&'static str, &Presigned)> {
        let globals = self.globals.as_ref().map(|globals| ("globals", globals));
        [("archive", &self.archive), ("manifest", &self.manifest)]
            .into_iter()
            .chain(globals)
    }
}

/// The keys of both kinds that have some: which one it is, only the whole of it says.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    command: Option<Vec<String>>,
    read_back: Option<Vec<String>>,
    store: Option<String>,
    archive: Option<Presigned>,
    manifest: Option<Presigned>,
    globals: Option<Presigned>,
    headers: Option<BTreeMap<String, String>>,
    ca_file: Option<String>,
}

impl Written {
    fn read<E: de::Error>(self) -> Result<CopyTo, E> {
        let Self {
            command,
            read_back,
            store,
            archive,
            manifest,
            globals,
            headers,
            ca_file,
        } = self;
        let missing = E::missing_field;
        if let Some(store) = store {
            if command.is_some() || read_back.is_some() {
                return Err(E::custom("a copy goes to a `store` or through a `command`"));
            }
            return Ok(CopyTo::Store(CopyStore {
                store,
                archive: archive.ok_or_else(|| missing("archive"))?,
                manifest: manifest.ok_or_else(|| missing("manifest"))?,
                globals,
                headers: headers.unwrap_or_default(),
                ca_file,
            }));
        }
        let of_store = archive.is_some() || manifest.is_some() || globals.is_some();
        if of_store || headers.is_some() || ca_file.is_some() {
            return Err(missing("store"));
        }
        Ok(CopyTo::Command(CopyCommand {
            command: command.ok_or_else(|| missing("command"))?,
            read_back: read_back.ok_or_else(|| missing("read_back"))?,
        }))
    }
}

impl<'de> Deserialize<'de> for CopyTo {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = CopyTo;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a directory, `{command: [...], read_back: [...]}`, or `{store: URL, \
                     archive: {put, get}, manifest: {put, get}}`",
                )
            }
            fn visit_str<E: de::Error>(self, directory: &str) -> Result<CopyTo, E> {
                Ok(CopyTo::Directory(directory.to_owned()))
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<CopyTo, A::Error> {
                Written::deserialize(MapAccessDeserializer::new(map))?.read()
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_goes_to_a_directory_through_a_command_or_to_a_store() {
        for text in [
            r#""/backups""#,
            r#"{"command":["rsync","{file}","b:/{id}"],"read_back":["ssh","b","cat","/{id}"]}"#,
            r#"{"store":"https://s3/b/","archive":{"put":"secret://a","get":"secret://b"},"manifest":{"put":"secret://c","get":"secret://d"}}"#,
            r#"{"store":"https://s3/b/","archive":{"put":"secret://a","get":"secret://b"},"manifest":{"put":"secret://c","get":"secret://d"},"globals":{"put":"secret://e","get":"secret://f"},"headers":{"x-ms-blob-type":"BlockBlob"},"ca_file":"/ca.pem"}"#,
        ] {
            let read: CopyTo = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&read).unwrap(), text);
        }
        for (text, why) in [
            ("7", "a directory"),
            (r#"{"command":["rsync"]}"#, "missing field `read_back`"),
            (r#"{"command":[],"read_back":[],"x":1}"#, "unknown field"),
            (
                r#"{"command":[],"read_back":[],"ca_file":"/x"}"#,
                "missing field `store`",
            ),
            (r#"{"store":"https://s3/b/"}"#, "missing field `archive`"),
            (
                r#"{"store":"https://s3/b/","command":["rsync"]}"#,
                "a `store` or through a `command`",
            ),
        ] {
            let error = serde_json::from_str::<CopyTo>(text).expect_err(text);
            assert!(error.to_string().contains(why), "{error}");
        }
    }
}
