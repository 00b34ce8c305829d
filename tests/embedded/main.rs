//! Tests of the embedded server: held to a real etcd, and in a test's hands.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../support/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the suite uses all of it")]
mod support;

mod differential;
mod dropped;
mod etcdctl;
mod freshness;
mod leases;
mod lines;
mod malformed;
mod queues;
mod registrations;
mod revived;
mod server;
mod simulation;
mod unanswered;
