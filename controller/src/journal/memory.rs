//! A journal in memory, for tests: what is "on the disk" is shared by everyone who opens it.

use std::sync::{Arc, Mutex, PoisonError};

use super::{AppendError, Head, Journal, JournalId, OpenError, chain};

/// What survives a close.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    id: JournalId,
    records: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            id: JournalId::random(),
            records: Arc::default(),
        }
    }
}

impl Memory {
    /// Another journal with the same records.
    #[cfg(feature = "faults")]
    pub(crate) fn copy(&self) -> Self {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        Self {
            id: self.id,
            records: Arc::new(Mutex::new(records.clone())),
        }
    }

    /// Opens the journal over what is there.
    pub(crate) fn open(&self) -> MemoryJournal {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let head = records
            .iter()
            .fold(self.id.anchor(), |head, payload| head.next(payload));
        MemoryJournal {
            memory: self.clone(),
            head,
        }
    }
}

/// A journal in memory.
#[derive(Debug)]
pub(crate) struct MemoryJournal {
    memory: Memory,
    head: Head,
}

impl Journal for MemoryJournal {
    fn id(&self) -> JournalId {
        self.memory.id
    }

    fn head(&self) -> Head {
        self.head
    }

    fn append(&mut self, payloads: &[Vec<u8>]) -> Result<Head, AppendError> {
        let heads = chain(self.head, payloads)?;
        let records = &self.memory.records;
        let mut records = records.lock().unwrap_or_else(PoisonError::into_inner);
        records.extend_from_slice(payloads);
        self.head = heads.last().copied().unwrap_or(self.head);
        Ok(self.head)
    }

    fn payloads(&self) -> Box<dyn Iterator<Item = Result<Vec<u8>, OpenError>> + '_> {
        let records = &self.memory.records;
        let records = records.lock().unwrap_or_else(PoisonError::into_inner);
        Box::new(records.clone().into_iter().map(Ok))
    }

    fn close(self: Box<Self>) {}
}
