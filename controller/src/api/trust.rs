//! What admins ask of who may be: tokens and suspensions.

use lockstep_core::trust::{Subject, TokenState};
use lockstep_core::{Answer, Call, Coordinator, TrustCall};
use lockstep_proto::ids::{Digest, HostId};
use lockstep_proto::values::Period;
use lockstep_proto::wire::control_v1 as wire;
use tonic::{Request, Response, Status};

use super::{Control, peer};
use crate::driver::wall_clock;

/// How long a token lives, if nobody says otherwise.
const TOKEN_LIFE: Period = Period(10 * 60 * 1000);

/// A host, an operator or a serial number, as people name it.
pub(super) fn subject(text: &str) -> Result<Subject, Status> {
    let subject = text.parse::<Subject>();
    subject.map_err(|error| Status::invalid_argument(error.to_string()))
}

impl Control {
    /// Makes a token. Only its hash goes further than this.
    pub(super) async fn make_token(
        &self,
        request: Request<wire::CreateTokenRequest>,
    ) -> Result<Response<wire::CreateTokenResponse>, Status> {
        if self.list.is_none() {
            return Err(Status::failed_precondition(
                "this controller does not hold the agents' issuer, so nobody can join: `[enroll]` \
                 is not in its configuration",
            ));
        }
        let peer = peer(&request)?;
        let wire::CreateTokenRequest { host, life_ms } = request.into_inner();
        let host: HostId = host
            .parse()
            .map_err(|error| Status::invalid_argument(format!("`host`: {error}")))?;
        let bits: [u8; 20] = rand::random();
        let secret = format!("{host}:{}", hex::encode(bits));
        let call = TrustCall::CreateToken {
            hash: Digest::of(secret.as_bytes()),
            host,
            life: if life_ms == 0 {
                TOKEN_LIFE
            } else {
                Period(life_ms)
            },
        };
        match self.call(&peer, Call::Trust(call)).await? {
            Answer::Token { token, until } => Ok(Response::new(wire::CreateTokenResponse {
                secret,
                token,
                until_ms: until.0,
            })),
            _ => unreachable!("a token that is made has a name"),
        }
    }

    pub(super) async fn tokens(&self) -> Result<Response<wire::ListTokensResponse>, Status> {
        let now = wall_clock();
        let read = move |coordinator: &Coordinator| {
            let tokens = coordinator.trust().tokens();
            let tokens = tokens.filter(|(_, token)| token.until >= now);
            let said = tokens.map(|(name, token)| wire::Token {
                token: name.clone(),
                host: token.host.to_string(),
                operator: token.operator.clone(),
                until_ms: token.until.0,
                state: match token.state {
                    TokenState::Open => "open",
                    TokenState::Revoked => "revoked",
                    TokenState::Used(_) => "used",
                }
                .to_owned(),
            });
            said.collect::<Vec<_>>()
        };
        let mut tokens = self.driver.read(read).await?;
        tokens.sort_by_key(|token| token.until_ms);
        Ok(Response::new(wire::ListTokensResponse { tokens }))
    }

    pub(super) async fn suspended(&self) -> Result<Response<wire::ListSuspendedResponse>, Status> {
        let read = |coordinator: &Coordinator| {
            let suspended = coordinator.trust().suspended();
            let said = suspended.map(|(subject, suspension)| wire::Suspension {
                subject: subject.to_string(),
                reason: suspension.reason.clone(),
                operator: suspension.operator.clone().unwrap_or_default(),
                since_ms: suspension.at.0,
            });
            said.collect::<Vec<_>>()
        };
        let suspended = self.driver.read(read).await?;
        // One that is not signed yet is signed in a moment.
        let agent_crl = match &self.list {
            Some(path) => tokio::fs::read_to_string(path).await.unwrap_or_default(),
            None => String::new(),
        };
        Ok(Response::new(wire::ListSuspendedResponse {
            suspended,
            agent_crl,
        }))
    }
}
