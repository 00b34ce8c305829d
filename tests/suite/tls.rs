//! Sessions over TLS: both sides show certificates, and who cannot is not let in.

use std::time::Duration;

use etcd_recipes::etcd_client::{Certificate, Identity, TlsOptions};
use etcd_recipes::{ConfigCache, Error, Mutex, Session, SessionBuilder};

use crate::support::certificates::Authority;
use crate::support::check::scoped_on;
use crate::support::needs::{Needs, lacking};
use crate::support::ports::free_port;
use crate::support::server::{Options, Server};

/// A server that serves clients with TLS too, if they show a certificate of the authority.
struct Secure {
    server: Server,
    endpoint: String,
    authority: Authority,
    _files: tempfile::TempDir,
}

impl Secure {
    async fn start() -> Self {
        let (authority, files) = (Authority::new(), tempfile::tempdir().unwrap());
        let own = authority.certify("127.0.0.1");
        let file = |name: &str, pem: &str| {
            let path = files.path().join(name);
            std::fs::write(&path, pem).unwrap();
            path.display().to_string()
        };
        let endpoint = format!("https://127.0.0.1:{}", free_port());
        let options = Options::fast()
            .listen(&endpoint)
            .arg(format!("--cert-file={}", file("server.pem", &own.certificate)))
            .arg(format!("--key-file={}", file("server.key", &own.key)))
            .arg(format!("--trusted-ca-file={}", file("ca.pem", &authority.pem())))
            .arg("--client-cert-auth");
        Self { server: Server::with(options).await, endpoint, authority, _files: files }
    }

    fn session(&self) -> SessionBuilder {
        Session::builder([&self.endpoint]).ttl(Duration::from_secs(2)).connect_timeout(Duration::from_secs(2))
    }

    /// Trusts the server.
    fn trusting(&self) -> TlsOptions {
        TlsOptions::new().ca_certificate(Certificate::from_pem(self.authority.pem()))
    }
}

#[tokio::test]
async fn a_session_with_a_certificate_works_as_any_other() {
    if lacking(Needs::Settings) {
        return;
    }
    let secure = Secure::start().await;
    scoped_on(&secure.server, async |scope| {
        let own = secure.authority.certify("client");
        let tls = secure.trusting().identity(Identity::from_pem(own.certificate, own.key));
        let session = secure.session().tls(tls).connect().await.unwrap();
        let guard = Mutex::new(&session, scope.key("lock")).unwrap().lock().await.unwrap();
        let config = ConfigCache::open(&session, scope.key("config")).await.unwrap();
        let revision = config.publish("a", "1").await.unwrap();
        config.wait_for(revision).await.unwrap();
        assert_eq!(config.get("a").unwrap().value(), b"1");
        guard.unlock().await.unwrap();
        config.delete("a").await.unwrap();
        drop(config);
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn who_shows_no_certificate_or_trusts_another_authority_is_told_so() {
    if lacking(Needs::Settings) {
        return;
    }
    let secure = Secure::start().await;
    scoped_on(&secure.server, async |_| {
        let stranger = TlsOptions::new().ca_certificate(Certificate::from_pem(Authority::new().pem()));
        for tls in [secure.trusting(), stranger] {
            let error = secure.session().tls(tls).connect().await.unwrap_err();
            assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
            assert!(error.to_string().contains(&secure.endpoint), "{error}");
            println!("{error}: {:?}", std::error::Error::source(&error));
        }
    })
    .await;
}
