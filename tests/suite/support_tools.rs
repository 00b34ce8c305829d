//! Tests of the test tools themselves, with nothing but a plain client.

mod check;
mod child;
mod faults;
mod poll;
mod proxy;
mod server;
