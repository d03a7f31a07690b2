//! For fuzzers: reports as agents send them.

use lockstep_proto::ids::HostId;
use lockstep_proto::report::Report;
use lockstep_proto::wire::agent_v1::Report as WireReport;

/// What the controller takes of an agent's report, if anything.
pub fn report(host: &HostId, report: WireReport) -> Option<Report> {
    super::read_report(host, report).ok()
}
