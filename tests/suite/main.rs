//! The integration tests, one program: each topic is a module, and the tools are in `tests/support`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "tools are written before the tests that need them")]
mod support;

mod cancellation;
mod examples;
mod late;
mod stress;
mod support_tools;
