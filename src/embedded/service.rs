//! The gRPC services: requests in, the engine's answers out.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::proto::{
    PbAlarmRequest, PbAlarmResponse, PbClusterServer, PbClusterService, PbCompactionRequest,
    PbCompactionResponse, PbDefragmentRequest, PbDefragmentResponse, PbDeleteRequest, PbDeleteResponse,
    PbDowngradeRequest, PbDowngradeResponse, PbHashKvRequest, PbHashKvResponse, PbHashRequest,
    PbHashResponse, PbKvServer, PbKvService, PbLeaseGrantRequest, PbLeaseGrantResponse,
    PbLeaseKeepAliveRequest, PbLeaseKeepAliveResponse, PbLeaseLeasesRequest, PbLeaseLeasesResponse,
    PbLeaseRevokeRequest, PbLeaseRevokeResponse, PbLeaseServer, PbLeaseService, PbLeaseTimeToLiveRequest,
    PbLeaseTimeToLiveResponse, PbMaintenanceServer, PbMaintenanceService, PbMember, PbMemberAddRequest,
    PbMemberAddResponse, PbMemberListRequest, PbMemberListResponse, PbMemberPromoteRequest,
    PbMemberPromoteResponse, PbMemberRemoveRequest, PbMemberRemoveResponse, PbMemberUpdateRequest,
    PbMemberUpdateResponse, PbMoveLeaderRequest, PbMoveLeaderResponse, PbPutRequest, PbPutResponse,
    PbRangeRequest, PbRangeResponse, PbRangeStreamResponse, PbSnapshotRequest, PbSnapshotResponse,
    PbStatusRequest, PbStatusResponse, PbTxnRequest, PbTxnResponse, PbWatchRequest, PbWatchResponse,
    PbWatchServer, PbWatchService,
};
use futures::Stream;
use futures::stream::unfold;
use http_body_util::Full;
use prost::Message;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

use super::engine::{Engine, MEMBER};
use super::named::{Named, unknown};
use super::status::Refusal;

/// What etcd this server behaves like.
const VERSION: &str = "3.5.16";
/// The largest request that is read, in bytes, and the largest that is served: etcd's defaults.
const MAX_MESSAGE: usize = 64 * 1024 * 1024;
const MAX_RECEIVED: usize = 2 * 1024 * 1024;
const MAX_REQUEST: usize = 1536 * 1024;
/// How often watches that asked for it are told how far they are.
const PROGRESS: Duration = Duration::from_secs(600);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The services of one server.
#[derive(Debug, Clone)]
pub(super) struct Services {
    pub(super) engine: Arc<Engine>,
    /// Where clients reach it, for the list of members.
    pub(super) url: Arc<str>,
    /// Cancelled when the server ends, and its streams with it.
    pub(super) closing: CancellationToken,
}

/// All services, by the paths of their methods.
pub(super) fn routes(services: &Services) -> Routes {
    let all = || services.clone();
    let services = Routes::new(Named(PbKvServer::new(all()).max_decoding_message_size(MAX_MESSAGE)))
        .add_service(Named(PbWatchServer::new(all())))
        .add_service(Named(PbLeaseServer::new(all())))
        .add_service(Named(PbMaintenanceServer::new(all())))
        .add_service(Named(PbClusterServer::new(all())));
    let others = |uri: http::Uri| async move {
        if uri.path() == "/health" {
            return http::Response::new(Body::new(Full::from(r#"{"health":"true","reason":""}"#)));
        }
        refusal(uri.path()).into_http::<Body>()
    };
    services.into_axum_router().fallback(others).into()
}

/// What is said of a method that has no service here.
fn refusal(path: &str) -> Status {
    if path == "/etcdserverpb.Auth/Authenticate" {
        // As an etcd that asks for no passwords.
        return Status::failed_precondition("etcdserver: authentication is not enabled");
    }
    let method = path.trim_start_matches('/');
    not_served(method.strip_prefix("etcdserverpb.").unwrap_or(method))
}

/// Refuses what etcd would not read.
fn check_received(request: &impl Message) -> Result<(), Status> {
    let size = request.encoded_len();
    if size <= MAX_RECEIVED {
        return Ok(());
    }
    let message = format!("grpc: received message larger than max ({size} vs. {MAX_RECEIVED})");
    Err(Status::resource_exhausted(message))
}

/// Refuses what etcd would not write.
fn check_size(request: &impl Message) -> Result<(), Status> {
    check_received(request)?;
    if request.encoded_len() > MAX_REQUEST { Err(Refusal::RequestTooLarge.into()) } else { Ok(()) }
}

fn not_served(method: &str) -> Status {
    Status::unimplemented(format!("{method} is not served by the embedded server"))
}

fn stream<T: Send + 'static>(receiver: UnboundedReceiver<T>, closing: CancellationToken) -> Answers<T> {
    Box::pin(unfold((receiver, closing), |(mut receiver, closing)| async move {
        tokio::select! {
            biased;
            message = receiver.recv() => message.map(|message| (Ok(message), (receiver, closing))),
            () = closing.cancelled() => None,
        }
    }))
}

#[tonic::async_trait]
impl PbKvService for Services {
    type RangeStreamStream = Answers<PbRangeStreamResponse>;

    async fn range(&self, request: Request<PbRangeRequest>) -> Result<Response<PbRangeResponse>, Status> {
        check_received(request.get_ref())?;
        Ok(Response::new(self.engine.range(request.get_ref())?))
    }

    async fn range_stream(
        &self,
        _: Request<PbRangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        // etcd has it from 3.6 on.
        Err(unknown("/etcdserverpb.KV/RangeStream"))
    }

    async fn put(&self, request: Request<PbPutRequest>) -> Result<Response<PbPutResponse>, Status> {
        check_size(request.get_ref())?;
        Ok(Response::new(self.engine.put(request.get_ref())?))
    }

    async fn delete_range(
        &self,
        request: Request<PbDeleteRequest>,
    ) -> Result<Response<PbDeleteResponse>, Status> {
        check_size(request.get_ref())?;
        Ok(Response::new(self.engine.delete(request.get_ref())?))
    }

    async fn txn(&self, request: Request<PbTxnRequest>) -> Result<Response<PbTxnResponse>, Status> {
        check_size(request.get_ref())?;
        Ok(Response::new(self.engine.txn(request.get_ref())?))
    }

    async fn compact(
        &self,
        request: Request<PbCompactionRequest>,
    ) -> Result<Response<PbCompactionResponse>, Status> {
        Ok(Response::new(self.engine.compact(request.into_inner())?))
    }
}

#[tonic::async_trait]
impl PbWatchService for Services {
    type WatchStream = Answers<PbWatchResponse>;

    async fn watch(
        &self,
        request: Request<Streaming<PbWatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (sender, receiver) = unbounded_channel();
        tokio::spawn(self.clone().read_watches(request.into_inner(), sender));
        Ok(Response::new(stream(receiver, self.closing.clone())))
    }
}

#[tonic::async_trait]
impl PbLeaseService for Services {
    type LeaseKeepAliveStream = Answers<PbLeaseKeepAliveResponse>;

    async fn lease_grant(
        &self,
        request: Request<PbLeaseGrantRequest>,
    ) -> Result<Response<PbLeaseGrantResponse>, Status> {
        Ok(Response::new(self.engine.grant(request.into_inner())?))
    }

    async fn lease_revoke(
        &self,
        request: Request<PbLeaseRevokeRequest>,
    ) -> Result<Response<PbLeaseRevokeResponse>, Status> {
        Ok(Response::new(self.engine.revoke(request.into_inner().id)?))
    }

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<PbLeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let (sender, receiver) = unbounded_channel();
        let (engine, mut requests) = (self.engine.clone(), request.into_inner());
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    biased;
                    () = sender.closed() => return,
                    request = requests.message() => match request {
                        Ok(Some(request)) => {
                            let _ = sender.send(engine.renew(request.id));
                        }
                        _ => return,
                    },
                }
            }
        });
        Ok(Response::new(stream(receiver, self.closing.clone())))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<PbLeaseTimeToLiveRequest>,
    ) -> Result<Response<PbLeaseTimeToLiveResponse>, Status> {
        Ok(Response::new(self.engine.time_to_live(request.into_inner())))
    }

    async fn lease_leases(
        &self,
        _: Request<PbLeaseLeasesRequest>,
    ) -> Result<Response<PbLeaseLeasesResponse>, Status> {
        Ok(Response::new(self.engine.leases()))
    }
}

impl Services {
    /// Reads the requests of one watch stream until one side ends it.
    async fn read_watches(
        self,
        mut requests: Streaming<PbWatchRequest>,
        sender: UnboundedSender<PbWatchResponse>,
    ) {
        let stream = self.engine.open_watches(sender.clone());
        let mut progress = tokio::time::interval(PROGRESS);
        progress.reset();
        loop {
            tokio::select! {
                biased;
                () = sender.closed() => break,
                request = requests.message() => match request {
                    Ok(Some(PbWatchRequest { request_union: Some(request) })) => self.engine.watch(stream, request),
                    Ok(Some(_)) => {}
                    _ => break,
                },
                _ = progress.tick() => self.engine.tell_progress(stream),
            }
        }
        self.engine.close_watches(stream);
    }
}

#[tonic::async_trait]
impl PbMaintenanceService for Services {
    type SnapshotStream = Answers<PbSnapshotResponse>;

    async fn alarm(&self, _: Request<PbAlarmRequest>) -> Result<Response<PbAlarmResponse>, Status> {
        // There are none.
        Ok(Response::new(PbAlarmResponse { header: Some(self.engine.header()), alarms: Vec::new() }))
    }

    async fn status(&self, _: Request<PbStatusRequest>) -> Result<Response<PbStatusResponse>, Status> {
        let header = self.engine.header();
        let index = u64::try_from(header.revision).unwrap_or(0);
        Ok(Response::new(PbStatusResponse {
            header: Some(header),
            version: VERSION.into(),
            leader: MEMBER,
            raft_index: index,
            raft_applied_index: index,
            raft_term: header.raft_term,
            ..PbStatusResponse::default()
        }))
    }

    async fn defragment(
        &self,
        _: Request<PbDefragmentRequest>,
    ) -> Result<Response<PbDefragmentResponse>, Status> {
        // Memory has no holes.
        Ok(Response::new(PbDefragmentResponse { header: Some(self.engine.header()) }))
    }

    async fn hash(&self, _: Request<PbHashRequest>) -> Result<Response<PbHashResponse>, Status> {
        Err(not_served("Maintenance/Hash"))
    }

    async fn hash_kv(&self, _: Request<PbHashKvRequest>) -> Result<Response<PbHashKvResponse>, Status> {
        Err(not_served("Maintenance/HashKV"))
    }

    async fn snapshot(
        &self,
        _: Request<PbSnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        Err(not_served("Maintenance/Snapshot"))
    }

    async fn move_leader(
        &self,
        _: Request<PbMoveLeaderRequest>,
    ) -> Result<Response<PbMoveLeaderResponse>, Status> {
        Err(not_served("Maintenance/MoveLeader"))
    }

    async fn downgrade(
        &self,
        _: Request<PbDowngradeRequest>,
    ) -> Result<Response<PbDowngradeResponse>, Status> {
        Err(not_served("Maintenance/Downgrade"))
    }
}

#[tonic::async_trait]
impl PbClusterService for Services {
    async fn member_add(
        &self,
        _: Request<PbMemberAddRequest>,
    ) -> Result<Response<PbMemberAddResponse>, Status> {
        Err(not_served("Cluster/MemberAdd"))
    }

    async fn member_remove(
        &self,
        _: Request<PbMemberRemoveRequest>,
    ) -> Result<Response<PbMemberRemoveResponse>, Status> {
        Err(not_served("Cluster/MemberRemove"))
    }

    async fn member_update(
        &self,
        _: Request<PbMemberUpdateRequest>,
    ) -> Result<Response<PbMemberUpdateResponse>, Status> {
        Err(not_served("Cluster/MemberUpdate"))
    }

    async fn member_list(
        &self,
        _: Request<PbMemberListRequest>,
    ) -> Result<Response<PbMemberListResponse>, Status> {
        let urls = vec![self.url.to_string()];
        let member = PbMember {
            id: MEMBER,
            name: "embedded".into(),
            peer_ur_ls: urls.clone(),
            client_ur_ls: urls,
            ..PbMember::default()
        };
        Ok(Response::new(PbMemberListResponse { header: Some(self.engine.header()), members: vec![member] }))
    }

    async fn member_promote(
        &self,
        _: Request<PbMemberPromoteRequest>,
    ) -> Result<Response<PbMemberPromoteResponse>, Status> {
        Err(not_served("Cluster/MemberPromote"))
    }
}
