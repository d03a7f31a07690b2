//! The tree of a plan file: every node with its place, nothing interpreted.

use std::collections::BTreeMap;

/// A place in the file: lines and columns from 1, columns in characters, the end exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) line: usize,
    pub(crate) column: usize,
    pub(crate) end_line: usize,
    pub(crate) end_column: usize,
}

impl Span {
    /// The very beginning of the file.
    pub(crate) const START: Self = Self {
        line: 1,
        column: 1,
        end_line: 1,
        end_column: 2,
    };
}

/// A node of a [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NodeId(pub(crate) u32);

/// One value of the file.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) span: Span,
    pub(crate) kind: Kind,
    /// The node that holds this one, and the key under which it stands there.
    pub(crate) parent: Option<(NodeId, Option<NodeId>)>,
}

/// What a node is.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Scalar(Scalar),
    Sequence(Vec<NodeId>),
    /// Keys and values; each key is a scalar, and stands once.
    Mapping(Vec<(NodeId, NodeId)>),
    /// Reported already; whatever follows from it is not worth a word.
    Broken,
}

/// A text, with what is needed to tell `5` from `"5"`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scalar {
    pub(crate) text: String,
    /// Written without quotes.
    pub(crate) plain: bool,
    /// Nothing but an input whose value was put in: it may be read as a number.
    pub(crate) whole_input: bool,
    /// Holds an input whose value is not known yet, so nothing can be said about it.
    pub(crate) open: bool,
}

/// A plan file as a tree.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    pub(crate) nodes: Vec<Node>,
    pub(crate) root: NodeId,
}

impl Tree {
    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    pub(crate) fn span(&self, id: NodeId) -> Span {
        self.node(id).span
    }

    pub(crate) fn scalar(&self, id: NodeId) -> Option<&Scalar> {
        match &self.node(id).kind {
            Kind::Scalar(scalar) => Some(scalar),
            _ => None,
        }
    }

    /// The text of a scalar; empty for anything else.
    pub(crate) fn text(&self, id: NodeId) -> &str {
        self.scalar(id).map_or("", |scalar| scalar.text.as_str())
    }

    /// The entries of a mapping; none for anything else.
    pub(crate) fn entries(&self, id: NodeId) -> &[(NodeId, NodeId)] {
        match &self.node(id).kind {
            Kind::Mapping(entries) => entries,
            _ => &[],
        }
    }

    /// The items of a sequence; none for anything else.
    pub(crate) fn items(&self, id: NodeId) -> &[NodeId] {
        match &self.node(id).kind {
            Kind::Sequence(items) => items,
            _ => &[],
        }
    }

    /// The value under a key of a mapping.
    pub(crate) fn get(&self, id: NodeId, key: &str) -> Option<NodeId> {
        let mut entries = self.entries(id).iter();
        entries
            .find(|(name, _)| self.text(*name) == key)
            .map(|(_, value)| *value)
    }

    /// The node that holds this one.
    pub(crate) fn holder(&self, id: NodeId) -> Option<NodeId> {
        self.node(id).parent.map(|(holder, _)| holder)
    }

    /// The key under which a node stands in its mapping.
    pub(crate) fn key_of(&self, id: NodeId) -> Option<&str> {
        let (_, key) = self.node(id).parent?;
        key.map(|key| self.text(key))
    }

    /// Calls `visit` with every scalar value (no keys) below `id`, in the order of the file.
    pub(crate) fn each_scalar(&self, id: NodeId, visit: &mut impl FnMut(NodeId, &Scalar)) {
        match &self.node(id).kind {
            Kind::Scalar(scalar) => visit(id, scalar),
            Kind::Sequence(items) => items.iter().for_each(|item| self.each_scalar(*item, visit)),
            Kind::Mapping(entries) => {
                for (_, value) in entries {
                    self.each_scalar(*value, visit);
                }
            }
            Kind::Broken => {}
        }
    }

    /// The inner nodes of a tree hold each other: writes down who holds whom.
    pub(crate) fn link(&mut self) {
        let mut parents: BTreeMap<NodeId, (NodeId, Option<NodeId>)> = BTreeMap::new();
        for (index, node) in (0_u32..).zip(&self.nodes) {
            let holder = NodeId(index);
            match &node.kind {
                Kind::Sequence(items) => {
                    parents.extend(items.iter().map(|item| (*item, (holder, None))));
                }
                Kind::Mapping(entries) => {
                    for (key, value) in entries {
                        parents.insert(*key, (holder, None));
                        parents.insert(*value, (holder, Some(*key)));
                    }
                }
                Kind::Scalar(_) | Kind::Broken => {}
            }
        }
        for (child, parent) in parents {
            self.nodes[child.0 as usize].parent = Some(parent);
        }
    }
}

/// One step of a path through a tree.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step<'a> {
    Key(&'a str),
    Item(usize),
}

impl<'a> From<&'a str> for Step<'a> {
    fn from(key: &'a str) -> Self {
        Self::Key(key)
    }
}

impl From<usize> for Step<'_> {
    fn from(index: usize) -> Self {
        Self::Item(index)
    }
}
