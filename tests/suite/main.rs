//! The integration tests, one program: each topic is a module, and the tools are in `tests/support`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "tools are written before the tests that need them")]
mod support;

mod auth;
mod auth_tokens;
mod bad_input;
mod beside;
mod burst;
mod cancellation;
mod config;
mod election;
mod election_loss;
mod election_observe;
mod examples;
mod interop;
mod interop_recreated;
mod late;
mod layering;
mod line_gaps;
mod loss;
mod members;
mod mutex;
mod mutex_line;
mod mutex_order;
mod neighbours;
mod queue;
mod quorum;
mod requests;
mod restart;
mod secrets;
mod send_sync;

#[cfg(feature = "tonic")]
mod service_channel;
mod service_discovery;
mod service_faults;
mod service_registration;
mod service_rivals;
mod session;
mod session_drop;
mod session_options;
mod stale_leader;
mod stress;
mod support_tools;
mod tls;
mod waiting;
