//! What is measured, and the targets.

use crate::common::table::{Case, case, ratio, row};
use crate::measure::Measure;

/// Everything that is measured.
pub(crate) fn cases() -> Vec<Case<Measure>> {
    let mut cases = vec![case(
        Measure::LockPair,
        [ratio("lock + unlock: p50 over the same two raw transactions").at_most(1.2)],
    )];
    for (one_session, sessions) in [(true, "one session"), (false, "a session each")] {
        let what = format!("64 distinct locks at once, {sessions}: ops/s over the same raw transactions");
        cases.push(case(Measure::DistinctLocks { locks: 64, one_session }, [ratio(what).at_least(0.85)]));
    }
    for (busy, others) in [(false, ""), (true, " among 1,000 other writes/s")] {
        for (waiters, limit) in [(2, 1.8), (8, 1.8), (64, 2.5)] {
            let what = format!("hand-off, {waiters} waiters{others}");
            let p50 = ratio(format!("{what}: p50 over the floor")).at_most(limit);
            let p99 = ratio(format!("{what}: p99 over its p50")).at_most(10.0);
            cases.push(case(Measure::Handoff { waiters, busy }, [p50, p99]));
        }
    }
    for waiters in [4, 64] {
        let what =
            format!("hand-off, {waiters} waiters, 5 ms away: p50 over a raw delete and its notification");
        cases.push(case(Measure::SlowLink { waiters }, [ratio(what).at_most(1.15)]));
    }
    for (waiters, faster, requests) in [(2, 30.0, 2.2), (8, 8.0, 2.2), (64, 1.0, 4.0), (256, 1.0, 4.0)] {
        let rate = row(format!("hand-offs/s, {waiters} waiters"), "1/s");
        let to_go = ratio(format!("hand-offs/s, {waiters} waiters: over Go's")).at_least(faster);
        let unary = row(format!("unary RPCs per contended acquire + release, {waiters} waiters"), "RPCs");
        cases.push(case(Measure::Throughput { waiters }, [rate, to_go, unary.at_most(requests)]));
    }
    let one_session = [
        row("hand-offs/s, 8 tasks on one session", "1/s"),
        ratio("hand-offs/s, 8 tasks on one session: over Go's 8 sessions on one connection").at_least(20.0),
    ];
    cases.push(case(Measure::OneSession { tasks: 8 }, one_session));
    let requests = ["lock", "unlock", "try_lock"];
    let requests =
        requests.map(|call| row(format!("unary RPCs per uncontended {call}"), "RPCs").at_most(1.0));
    cases.push(case(Measure::Requests, requests));
    for waiters in [256, 1000] {
        let messages =
            row(format!("watch messages out per hand-off, {waiters} waiting sessions"), "messages");
        let told =
            row(format!("watch messages out per hand-off, {waiters} waiting sessions: events"), "messages");
        cases.push(case(Measure::Audience { waiters }, [messages.at_most(16.0), told]));
    }
    let session_memory = [
        row("memory per waiting session, 1,000 on one connection", "bytes"),
        ratio("memory per waiting session: over Go's").at_most(1.0 / 3.0),
    ];
    cases.push(case(Measure::SessionMemory { sessions: 1000 }, session_memory));
    for (names, what) in [(100, "100 locks"), (1, "one lock")] {
        let each = row(format!("memory per waiter, 10,000 on one session, {what}"), "bytes").at_most(4096.0);
        cases.push(case(Measure::WaiterMemory { waiters: 10_000, names }, [each]));
    }
    cases
}
