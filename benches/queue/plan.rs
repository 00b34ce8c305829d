//! What is measured, and the targets.

use crate::common::table::{Case, case, ratio, row};
use crate::measure::Measure;

/// Everything that is measured.
pub(crate) fn cases() -> Vec<Case<Measure>> {
    let mut cases = Vec::new();
    for (consumers, faster) in [(1, Some(50.0)), (4, None), (16, Some(300.0))] {
        let what = format!("draining, {consumers} consumers");
        let requests = row(format!("{what}: unary RPCs per item"), "RPCs").at_most(1.25);
        let to_go = ratio(format!("{what}: items/s over Go's"));
        let to_go = match faster {
            Some(faster) => to_go.at_least(faster),
            None => to_go,
        };
        let rows = [requests, row(format!("{what}: items/s"), "1/s"), to_go];
        cases.push(case(Measure::Drain { consumers, claims: false }, rows));
    }
    for consumers in [1, 16] {
        let what = format!("draining with claim and ack, {consumers} consumers");
        let requests = row(format!("{what}: unary RPCs per item"), "RPCs").at_most(2.25);
        cases.push(case(
            Measure::Drain { consumers, claims: true },
            [requests, row(format!("{what}: items/s"), "1/s")],
        ));
    }
    let length = "100,000 waiting over 1,000";
    cases.push(case(
        Measure::Length,
        [
            ratio(format!("time per item, {length}")).at_most(1.3),
            ratio(format!("etcd's CPU time per item, {length}")).at_most(1.3),
        ],
    ));
    cases.push(case(
        Measure::Batch,
        [
            ratio("enqueue_all: items/s over single raw puts").at_least(15.0),
            ratio("enqueue: items/s over single raw puts"),
        ],
    ));
    for (consumers, slower) in [(1, 3.0), (4, 3.0), (16, 5.0)] {
        let what = format!("200 items/s, {consumers} waiting consumers");
        cases.push(case(
            Measure::Waiting { consumers },
            [
                row(format!("{what}: unary RPCs per item taken"), "RPCs").at_most(2.0),
                row(format!("{what}: unary RPCs per item claimed and acked"), "RPCs"),
                ratio(format!("{what}: enqueue to claim, p50 over a raw watch notification")).at_most(slower),
            ],
        ));
    }
    let memory = row("memory of a consumer of 100,000 waiting items of 100 bytes, above idle", "MiB");
    cases.push(case(Measure::Memory, [memory.at_most(60.0)]));
    cases
}
