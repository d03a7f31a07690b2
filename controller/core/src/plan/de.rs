//! serde's way into a tree: each value is read as what the type that asks for it wants, and each
//! error knows its node. [`Reader`] makes of that one pass that collects every problem.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeSeed, EnumAccess, Expected, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, VariantAccess, Visitor,
};

use super::finding::list;
use super::node::{Kind, NodeId, Scalar};
use super::reader::Reader;

/// The name under which [`At`](super::raw::At) asks for the place of a value along with it.
pub(crate) const PLACED: &str = "$lockstep.placed";

/// Why a value could not be read, and the node that is to blame.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(super) node: Option<NodeId>,
    /// The keys of the struct that lacks one.
    pub(super) fields: &'static [&'static str],
    pub(super) kind: FaultKind,
}

/// What is wrong.
#[derive(Debug)]
pub(super) enum FaultKind {
    Missing(&'static str),
    Type {
        expected: String,
        found: String,
    },
    Variant {
        given: String,
        known: &'static [&'static str],
        /// The enum's name.
        of: &'static str,
    },
    Custom(String),
}

impl From<FaultKind> for Fault {
    fn from(kind: FaultKind) -> Self {
        Self {
            node: None,
            fields: &[],
            kind,
        }
    }
}

impl Fault {
    fn wrong_type(expected: &str, found: impl Into<String>) -> Self {
        FaultKind::Type {
            expected: expected.to_owned(),
            found: found.into(),
        }
        .into()
    }

    /// The fault belongs to `node`, unless a node further in was blamed already.
    fn at(mut self, node: NodeId) -> Self {
        self.node.get_or_insert(node);
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            FaultKind::Missing(field) => write!(f, "missing {field}"),
            FaultKind::Type { expected, found } => write!(f, "expected {expected}, found {found}"),
            FaultKind::Variant { given, .. } => write!(f, "no {given}"),
            FaultKind::Custom(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        FaultKind::Custom(message.to_string()).into()
    }
    fn missing_field(field: &'static str) -> Self {
        FaultKind::Missing(field).into()
    }
    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::wrong_type(&friendly(&expected.to_string()), found.to_string())
    }
    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let found = match found {
            Unexpected::Unsigned(number) => number.to_string(),
            Unexpected::Signed(number) => number.to_string(),
            other => other.to_string(),
        };
        Self::wrong_type(&friendly(&expected.to_string()), found)
    }
    fn unknown_variant(given: &str, known: &'static [&'static str]) -> Self {
        FaultKind::Variant {
            given: given.to_owned(),
            known,
            of: "",
        }
        .into()
    }
}

/// serde's names of types, in the words of the plan language.
fn friendly(expected: &str) -> String {
    match expected {
        "u8" => "a whole number from 0 to 255".to_owned(),
        "u16" => "a whole number from 0 to 65535".to_owned(),
        "u32" | "u64" | "usize" => "a whole number, not negative".to_owned(),
        "i8" | "i16" | "i32" | "i64" => "a whole number".to_owned(),
        "a string" => "a text".to_owned(),
        "a boolean" => "`true` or `false`".to_owned(),
        other if other.starts_with("struct ") => "a mapping".to_owned(),
        other => other.to_owned(),
    }
}

/// The value at one node.
#[derive(Clone, Copy)]
pub(crate) struct De<'r> {
    reader: &'r Reader<'r>,
    node: NodeId,
}

impl<'r> De<'r> {
    pub(super) fn new(reader: &'r Reader<'r>, node: NodeId) -> Self {
        Self { reader, node }
    }

    fn kind(self) -> &'r Kind {
        &self.reader.tree.node(self.node).kind
    }

    fn fault(self, expected: &str) -> Fault {
        Fault::wrong_type(expected, self.found()).at(self.node)
    }

    /// What is here, for people.
    fn found(self) -> String {
        match self.kind() {
            Kind::Scalar(scalar) if is_null(scalar) => "nothing".to_owned(),
            Kind::Scalar(scalar) => {
                let short: String = scalar.text.chars().take(40).collect();
                let more = if short.len() < scalar.text.len() {
                    "..."
                } else {
                    ""
                };
                if scalar.plain && as_number(&scalar.text).is_none() {
                    format!("`{short}{more}`")
                } else if scalar.plain {
                    format!("the number `{short}{more}`")
                } else {
                    format!("the text `{short}{more}`")
                }
            }
            Kind::Sequence(_) => "a list".to_owned(),
            Kind::Mapping(_) => "a mapping".to_owned(),
            Kind::Broken => "nothing".to_owned(),
        }
    }

    /// The scalar here, if it may be read as a number or truth value.
    fn bare(self) -> Option<&'r str> {
        match self.kind() {
            Kind::Scalar(scalar) if scalar.plain || scalar.whole_input => Some(&scalar.text),
            _ => None,
        }
    }

    fn integer<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let expected = friendly(&(&visitor as &dyn Expected).to_string());
        let visited = match self.bare().and_then(as_number) {
            Some(Number::Unsigned(number)) => visitor.visit_u64(number),
            Some(Number::Signed(number)) => visitor.visit_i64(number),
            Some(Number::Float(_)) | None => return Err(self.fault(&expected)),
        };
        visited.map_err(|fault: Fault| fault.at(self.node))
    }

    fn text<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.kind() {
            Kind::Scalar(scalar) if !is_null(scalar) => visitor
                .visit_str(&scalar.text)
                .map_err(|fault: Fault| fault.at(self.node)),
            _ => Err(self.fault(&friendly(&(&visitor as &dyn Expected).to_string()))),
        }
    }

    fn mapping<'de, V: Visitor<'de>>(
        self,
        fields: Option<&'static [&'static str]>,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let Kind::Mapping(entries) = self.kind() else {
            return Err(self.fault("a mapping"));
        };
        let access = Entries {
            reader: self.reader,
            rest: entries.iter(),
            fields,
            value: None,
        };
        visitor.visit_map(access).map_err(|mut fault| {
            if fault.node.is_none() {
                fault.fields = fields.unwrap_or_default();
            }
            fault.at(self.node)
        })
    }
}

enum Number {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
}

/// A number of YAML 1.2's core schema; those that are not finite are left texts.
fn as_number(text: &str) -> Option<Number> {
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).ok().map(Number::Unsigned);
    }
    if let Some(digits) = text.strip_prefix("0o") {
        return u64::from_str_radix(digits, 8).ok().map(Number::Unsigned);
    }
    if !text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c)) {
        return None;
    }
    if let Ok(number) = text.parse::<u64>() {
        return Some(Number::Unsigned(number));
    }
    if let Ok(number) = text.parse::<i64>() {
        return Some(Number::Signed(number));
    }
    let is_float = |c: char| c.is_ascii_digit() || "+-.eE".contains(c);
    let number = text
        .parse::<f64>()
        .ok()
        .filter(|number| number.is_finite())?;
    text.chars().all(is_float).then_some(Number::Float(number))
}

fn as_bool(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" => Some(true),
        "false" | "False" | "FALSE" => Some(false),
        _ => None,
    }
}

/// Nothing: what is written as `null` or `~`, or not at all.
pub(crate) fn is_null(scalar: &Scalar) -> bool {
    scalar.plain && matches!(scalar.text.as_str(), "" | "~" | "null" | "Null" | "NULL")
}

macro_rules! integers {
    ($($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            self.integer(visitor)
        })*
    };
}

macro_rules! texts {
    ($($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            self.text(visitor)
        })*
    };
}

impl<'de> de::Deserializer<'de> for De<'_> {
    type Error = Fault;

    integers! {
        deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64
    }

    texts! { deserialize_char deserialize_str deserialize_string deserialize_identifier }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let visited = match self.kind() {
            Kind::Scalar(scalar) if !scalar.plain => visitor.visit_str(&scalar.text),
            Kind::Scalar(scalar) if is_null(scalar) => visitor.visit_unit(),
            Kind::Scalar(scalar) => match (as_bool(&scalar.text), as_number(&scalar.text)) {
                (Some(value), _) => visitor.visit_bool(value),
                (_, Some(Number::Unsigned(number))) => visitor.visit_u64(number),
                (_, Some(Number::Signed(number))) => visitor.visit_i64(number),
                (_, Some(Number::Float(number))) => visitor.visit_f64(number),
                (None, None) => visitor.visit_str(&scalar.text),
            },
            Kind::Sequence(_) => return self.deserialize_seq(visitor),
            Kind::Mapping(_) => return self.deserialize_map(visitor),
            Kind::Broken => return Err(self.fault("a value")),
        };
        visited.map_err(|fault: Fault| fault.at(self.node))
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.bare().and_then(as_bool) {
            Some(value) => visitor
                .visit_bool(value)
                .map_err(|fault: Fault| fault.at(self.node)),
            None => Err(self.fault("`true` or `false`")),
        }
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.bare() {
            Some(text) if as_number(text).is_some() => {
                let number = text.parse().map_err(|_| self.fault("a number"))?;
                visitor.visit_f64(number)
            }
            _ => Err(self.fault("a number")),
        }
    }

    /// A key that stands there has a value: what is optional is left out.
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor
            .visit_newtype_struct(self)
            .map_err(|fault| fault.at(self.node))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let Kind::Sequence(items) = self.kind() else {
            return Err(self.fault("a list"));
        };
        let items = Items {
            reader: self.reader,
            items: items.iter(),
        };
        visitor
            .visit_seq(items)
            .map_err(|fault| fault.at(self.node))
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        if name == PLACED {
            return visitor.visit_seq(Placed {
                de: self,
                told: false,
            });
        }
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.mapping(None, visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.mapping(Some(fields), visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let (word, content) = match self.kind() {
            Kind::Scalar(scalar) if !is_null(scalar) => (self.node, None),
            Kind::Mapping(entries) => {
                let is_note =
                    |(key, _): &&(NodeId, NodeId)| self.reader.tree.text(*key).starts_with("x-");
                let mut entries = entries.iter().filter(|entry| !is_note(entry));
                match (entries.next(), entries.next()) {
                    (Some((word, content)), None) if !self.reader.is_out(*content) => {
                        (*word, Some(*content))
                    }
                    _ => return Err(self.fault("a mapping with one key")),
                }
            }
            _ => {
                let known = format!("one of {}", list(variants, "or"));
                return Err(self.fault(&known));
            }
        };
        let given = self.reader.tree.text(word);
        if !variants.contains(&given) {
            let kind = FaultKind::Variant {
                given: given.to_owned(),
                known: variants,
                of: name,
            };
            return Err(Fault::from(kind).at(self.node));
        }
        let choice = Choice {
            word: given,
            content: content.map(|node| De { node, ..self }),
        };
        visitor
            .visit_enum(choice)
            .map_err(|fault| fault.at(self.node))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! { bytes byte_buf unit unit_struct }
}

/// First the node's number, then its value.
struct Placed<'r> {
    de: De<'r>,
    told: bool,
}

impl<'de> SeqAccess<'de> for Placed<'_> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Fault> {
        if std::mem::replace(&mut self.told, true) {
            let node = self.de.node;
            seed.deserialize(self.de)
                .map(Some)
                .map_err(|fault| fault.at(node))
        } else {
            seed.deserialize(self.de.node.0.into_deserializer())
                .map(Some)
        }
    }
}

struct Items<'r> {
    reader: &'r Reader<'r>,
    items: std::slice::Iter<'r, NodeId>,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Fault> {
        let reader = self.reader;
        let next = self.items.find(|item| !reader.is_out(**item));
        let Some(node) = next.copied() else {
            return Ok(None);
        };
        let read = seed.deserialize(De { reader, node });
        read.map(Some).map_err(|fault| fault.at(node))
    }
}

struct Entries<'r> {
    reader: &'r Reader<'r>,
    rest: std::slice::Iter<'r, (NodeId, NodeId)>,
    /// The keys of a struct; `None` for a mapping whose keys are free.
    fields: Option<&'static [&'static str]>,
    value: Option<NodeId>,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Fault> {
        let reader = self.reader;
        for (key, value) in self.rest.by_ref() {
            if reader.is_out(*value) || reader.is_out(*key) {
                continue;
            }
            if let Some(fields) = self.fields {
                let name = reader.tree.text(*key);
                if name.starts_with("x-") {
                    continue;
                }
                if !fields.contains(&name) {
                    reader.report_unknown_key(*key, fields);
                    continue;
                }
            }
            self.value = Some(*value);
            let read = seed.deserialize(De { reader, node: *key });
            return read.map(Some).map_err(|fault| fault.at(*key));
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let node = self.value.take().expect("serde asks for a key first");
        let reader = self.reader;
        seed.deserialize(De { reader, node })
            .map_err(|fault| fault.at(node))
    }
}

/// The word of an enum, with what stands under it.
struct Choice<'r> {
    word: &'r str,
    content: Option<De<'r>>,
}

impl<'de, 'r> EnumAccess<'de> for Choice<'r> {
    type Error = Fault;
    type Variant = Content<'r>;

    fn variant_seed<V: DeserializeSeed<'de>>(
        self,
        seed: V,
    ) -> Result<(V::Value, Content<'r>), Fault> {
        let word: StrDeserializer<'_, Fault> = self.word.into_deserializer();
        let content = Content {
            word: self.word,
            content: self.content,
        };
        Ok((seed.deserialize(word)?, content))
    }
}

struct Content<'r> {
    word: &'r str,
    content: Option<De<'r>>,
}

impl<'r> Content<'r> {
    fn needed(self) -> Result<De<'r>, Fault> {
        let word = self.word;
        self.content.ok_or_else(|| {
            Fault::from(FaultKind::Custom(format!(
                "`{word}` needs its own keys: write `{word}: {{...}}`"
            )))
        })
    }
}

impl<'de> VariantAccess<'de> for Content<'_> {
    type Error = Fault;

    fn unit_variant(self) -> Result<(), Fault> {
        match self.content {
            None => Ok(()),
            Some(content) => {
                let message = format!("`{}` stands alone, without keys of its own", self.word);
                Err(Fault::from(FaultKind::Custom(message)).at(content.node))
            }
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Fault> {
        let content = self.needed()?;
        seed.deserialize(content)
            .map_err(|fault| fault.at(content.node))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Fault> {
        de::Deserializer::deserialize_tuple(self.needed()?, len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.needed()?.mapping(Some(fields), visitor)
    }
}
