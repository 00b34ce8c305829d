//! The messages and services of `courseware.proto` and `greet.proto`, as `tonic-prost-build` generates them. They are kept
//! here so that nobody needs `protoc` for them.

#![allow(missing_docs, unreachable_pub, dead_code, clippy::all, clippy::too_many_lines, reason = "generated")]

#[rustfmt::skip]
pub mod courseware;
#[rustfmt::skip]
pub mod greet;
