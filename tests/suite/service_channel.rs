//! The gRPC channel over discovered instances: TLS, instances that are not there, calls under way.

#[path = "../../examples/courseware_proto/mod.rs"]
mod proto;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_recipes::service::{Balancer, Instance, Policy, Registration, ServiceChannel, Services};
use futures::future::join_all;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, Server, ServerTlsConfig};
use tonic::{Code, Request, Response, Status};

use self::proto::greet::greet_client::GreetClient;
use self::proto::greet::greet_server::{Greet, GreetServer};
use self::proto::greet::{GreetRequest, GreetResponse};
use super::service_registration::services;
use crate::support::background;
use crate::support::certificates::Authority;
use crate::support::check::{eventually, scoped};
use crate::support::ports::free_port;
use crate::support::sessions::session;

/// Answers with its name: in the morning at once, at night when it may.
struct Greeter {
    name: String,
    nights: Arc<Semaphore>,
    asked: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl Greet for Greeter {
    async fn morning(&self, _: Request<GreetRequest>) -> Result<Response<GreetResponse>, Status> {
        Ok(Response::new(GreetResponse { message: String::new(), from: self.name.clone() }))
    }

    async fn night(&self, _: Request<GreetRequest>) -> Result<Response<GreetResponse>, Status> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let permit = self.nights.acquire().await;
        permit.map_err(|_| Status::aborted("the night is over"))?.forget();
        Ok(Response::new(GreetResponse { message: String::new(), from: self.name.clone() }))
    }
}

/// A server on the tools' runtime, until it is dropped.
struct Running {
    address: String,
    nights: Arc<Semaphore>,
    /// How many nights were asked for.
    asked: Arc<AtomicUsize>,
    end: CancellationToken,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

async fn serve(name: &str, tls: Option<ServerTlsConfig>) -> Running {
    let (name, end, nights) = (name.to_owned(), CancellationToken::new(), Arc::new(Semaphore::new(0)));
    let asked = Arc::new(AtomicUsize::new(0));
    let (stop, greeter) = (end.clone(), Greeter { name, nights: nights.clone(), asked: asked.clone() });
    let listening = background().spawn(async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut server = Server::builder();
        if let Some(tls) = tls {
            server = server.tls_config(tls).unwrap();
        }
        let server = server.add_service(GreetServer::new(greeter));
        let serving = server.serve_with_incoming(TcpIncoming::from(listener));
        tokio::spawn(async move {
            tokio::select! {
                served = serving => served.unwrap(),
                () = stop.cancelled() => {}
            }
        });
        address
    });
    Running { address: listening.await.unwrap(), nights, asked, end }
}

async fn register(services: &Services, address: &str) -> Registration {
    services.register(Instance::new("greet", address)).await.unwrap()
}

async fn morning(channel: &ServiceChannel) -> Result<String, Status> {
    let answer = GreetClient::new(channel.clone()).morning(GreetRequest::default()).await?;
    Ok(answer.into_inner().from)
}

async fn night(channel: ServiceChannel) -> Result<String, Status> {
    let answer = GreetClient::new(channel).night(GreetRequest::default()).await?;
    Ok(answer.into_inner().from)
}

/// Instances that nobody listens at cost no call.
#[tokio::test]
async fn dead_instances_are_left_out() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let discovery = services.discover("greet").open().await.unwrap();
        let channel = discovery.channel().build();
        let none = morning(&channel).await.unwrap_err();
        assert_eq!((none.code(), none.message()), (Code::Unavailable, "no instance of greet is registered"));
        let (a, b) = (serve("a", None).await, serve("b", None).await);
        let mut all = Vec::new();
        for address in [&a.address, &b.address, &format!("127.0.0.1:{}", free_port()), "not an address"] {
            all.push(register(&services, address).await);
        }
        discovery.ready().await.unwrap();
        while discovery.snapshot().instances.len() < 4 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let answers = join_all((0..100).map(|_| morning(&channel))).await;
        let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
        assert!(["a", "b"].iter().all(|name| answers.iter().filter(|from| from == name).count() > 20));
        // With nobody else, it says why.
        for registration in &all[..2] {
            registration.deregister().await.unwrap();
        }
        while discovery.snapshot().instances.len() > 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let error = morning(&channel).await.unwrap_err();
        assert!(
            error.code() == Code::Unavailable && error.message().starts_with("cannot connect to"),
            "{error}"
        );
        let causes = ["Connection refused", "invalid"];
        assert!(causes.iter().any(|cause| error.message().contains(cause)), "{error}");
        drop((all, channel, discovery));
        session.close().await.unwrap();
    })
    .await;
}

/// Calls under way on an instance that is deregistered are answered.
#[tokio::test]
async fn calls_under_way_survive_a_deregistration() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let (a, b) = (serve("a", None).await, serve("b", None).await);
        let registration = register(&services, &a.address).await;
        let discovery = services.discover("greet").open().await.unwrap();
        let channel = discovery.channel().build();
        let call = tokio::spawn(night(channel.clone()));
        let other = register(&services, &b.address).await;
        registration.deregister().await.unwrap();
        while discovery.snapshot().instances.iter().any(|instance| instance.address == a.address) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for _ in 0..10 {
            assert_eq!(morning(&channel).await.unwrap(), "b");
        }
        a.nights.add_permits(1);
        b.nights.add_permits(1);
        assert_eq!(call.await.unwrap().unwrap(), "a");
        drop((other, channel, discovery));
        session.close().await.unwrap();
    })
    .await;
}

/// As in a `select` that went on with something else: it was connecting.
#[tokio::test]
async fn a_call_that_is_not_polled_any_more_keeps_nobody_waiting() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let server = serve("a", None).await;
        let registration = register(&services, &server.address).await;
        let discovery = services.discover("greet").open().await.unwrap();
        let channel = discovery.channel().build();
        let mut first = Box::pin(morning(&channel));
        assert!(futures::poll!(&mut first).is_pending());
        let second = tokio::time::timeout(Duration::from_secs(20), morning(&channel)).await;
        assert_eq!(second.expect("it waits for the first").unwrap(), "a");
        assert_eq!(first.await.unwrap(), "a");
        drop((registration, channel, discovery));
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn calls_go_where_fewer_are_pending() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let (a, b) = (serve("a", None).await, serve("b", None).await);
        let all = [register(&services, &a.address).await, register(&services, &b.address).await];
        let discovery = services.discover("greet").open().await.unwrap();
        let channel = discovery.channel().balancer(Balancer::new(Policy::LeastPending)).build();
        let calls: Vec<_> = (0..10).map(|_| tokio::spawn(night(channel.clone()))).collect();
        // Ten are under way, five each; those of b are answered.
        eventually(Duration::from_secs(20), "five each", async || {
            [&a, &b].iter().all(|server| server.asked.load(Ordering::SeqCst) == 5)
        })
        .await;
        b.nights.add_permits(100);
        for _ in 0..20 {
            assert!(morning(&channel).await.is_ok());
        }
        let count = async |name: &str| {
            let mut count = 0;
            for _ in 0..20 {
                count += usize::from(morning(&channel).await.unwrap() == name);
            }
            count
        };
        assert_eq!(count("a").await, 0, "five calls are pending there");
        a.nights.add_permits(100);
        for call in calls {
            call.await.unwrap().unwrap();
        }
        assert!(count("a").await > 0);
        drop((all, channel, discovery));
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn tls_is_for_the_endpoint_to_say() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let authority = Authority::new();
        let server = authority.certify("127.0.0.1");
        let identity = Identity::from_pem(server.certificate, server.key);
        let secure = serve("secure", Some(ServerTlsConfig::new().identity(identity))).await;
        let registration = register(&services, &secure.address).await;
        let discovery = services.discover("greet").open().await.unwrap();

        let ca = Certificate::from_pem(authority.pem());
        let connect = move |instance: &Instance| {
            let tls = ClientTlsConfig::new().ca_certificate(ca.clone());
            Endpoint::from_shared(format!("https://{}", instance.address))?.tls_config(tls)
        };
        let channel = discovery.channel().endpoint(connect).build();
        assert_eq!(morning(&channel).await.unwrap(), "secure");

        // Who does not know the authority is not served.
        let connect = move |instance: &Instance| {
            Endpoint::from_shared(format!("https://{}", instance.address))?.tls_config(ClientTlsConfig::new())
        };
        let stranger = discovery.channel().endpoint(connect).build();
        assert_eq!(morning(&stranger).await.unwrap_err().code(), Code::Unavailable);
        drop((registration, channel, stranger, discovery));
        session.close().await.unwrap();
    })
    .await;
}

/// A deadline of the caller is no fault of the instance.
#[tokio::test]
async fn deadline_of_a_call_does_not_hurt_its_instance() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let (a, b) = (serve("a", None).await, serve("b", None).await);
        let all = [register(&services, &a.address).await, register(&services, &b.address).await];
        let discovery = services.discover("greet").open().await.unwrap();
        let channel = discovery.channel().build();
        for _ in 0..2 {
            let mut request = Request::new(GreetRequest::default());
            request.set_timeout(Duration::from_millis(50));
            let error = GreetClient::new(channel.clone()).night(request).await.unwrap_err();
            assert!(matches!(error.code(), Code::Cancelled | Code::DeadlineExceeded), "{error}");
        }
        let answers = [morning(&channel).await.unwrap(), morning(&channel).await.unwrap()];
        assert_ne!(answers[0], answers[1], "both are called still");
        drop((all, channel, discovery));
        session.close().await.unwrap();
    })
    .await;
}
