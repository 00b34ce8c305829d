//! The layouts that this crate knows.
//!
//! | format | key | carries, besides the address |
//! |---|---|---|
//! | [`Json`] (the default) | `services/{service}/{id}` | everything |
//! | [`Endpoints`], Go's `naming/endpoints` | `{service}/{id}` | everything |
//! | [`GoZero`] | `{service}/{id}` | nothing |
//! | [`Kratos`] | `/microservices/{service}/{id}` | id, version, weight, metadata |
//! | [`Kitex`] | `kitex/registry-etcd/{service}/{address}` | weight, metadata |
//! | [`NameIp`] | `{service}/{address}` | nothing |
//! | [`Gateway`] | `{service}{id}`, the id being a number | id |
//! | [`Versioned`] | `/{service}/{version}/{address}` | version, weight |
//! | [`Namespaced`] | `/ns/{service}/{address}` | nothing |
//!
//! Service names are used as they are. Where a layout allows it, a service whose name begins with that of another is
//! never mixed up with it.

mod endpoints;
mod gateway;
mod go_zero;
mod json;
mod kitex;
mod kratos;
mod name_ip;
mod namespaced;
mod versioned;

pub use self::endpoints::Endpoints;
pub use self::gateway::Gateway;
pub use self::go_zero::GoZero;
pub use self::json::Json;
pub use self::kitex::Kitex;
pub use self::kratos::Kratos;
pub use self::name_ip::NameIp;
pub use self::namespaced::Namespaced;
pub use self::versioned::Versioned;

#[cfg(test)]
mod tests;
