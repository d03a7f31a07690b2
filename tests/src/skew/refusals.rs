//! What an older release does not know.

use anyhow::Result;

use super::{Releases, Story};
use crate::cluster::Cluster;

pub(super) const ALL: [Story; 0] = [];

pub(super) fn controller_goes_back(_c: &mut Cluster, _r: &Releases) -> Result<Vec<String>> {
    Ok(vec![])
}
pub(super) fn agent_goes_back(_c: &mut Cluster, _r: &Releases) -> Result<Vec<String>> {
    Ok(vec![])
}
