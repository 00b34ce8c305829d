//! What the server answers.

use std::net::SocketAddr;

use tonic::{Request, Response, Status};

use crate::proto::courseware::courseware_server::Courseware;
use crate::proto::courseware::{GetRequest, GetResponse};
use crate::proto::greet::greet_server::Greet;
use crate::proto::greet::{GreetRequest, GreetResponse};

/// Knows every course, and who it is.
#[derive(Debug, Clone)]
pub(crate) struct Teacher {
    address: String,
}

impl Teacher {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self { address: address.to_string() }
    }

    fn greet(&self, time: &str, request: &GreetRequest) -> Response<GreetResponse> {
        let message = format!("good {time}, {}", request.name);
        Response::new(GreetResponse { message, from: self.address.clone() })
    }
}

#[tonic::async_trait]
impl Courseware for Teacher {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let id = request.get_ref().id;
        let (code, name) = (format!("course-{id}"), self.address.clone());
        Ok(Response::new(GetResponse { id, code, name, r#type: 1 }))
    }
}

#[tonic::async_trait]
impl Greet for Teacher {
    async fn morning(&self, request: Request<GreetRequest>) -> Result<Response<GreetResponse>, Status> {
        Ok(self.greet("morning", request.get_ref()))
    }

    async fn night(&self, request: Request<GreetRequest>) -> Result<Response<GreetResponse>, Status> {
        Ok(self.greet("night", request.get_ref()))
    }
}
