//! A holder learns in time that it lost: within 100 ms when somebody takes the key or the lease away, and before etcd
//! acts when nobody can tell it.

mod blocked;
mod fence;
mod outside;
mod renewals;
mod silence;
mod stopped;
