//! Sends messages to people: webhooks, Slack, e-mail.
//!
//! A message is sent at most once, and whatever becomes of it changes no rollout. Errors name the
//! cause but no address that came from a secret (INV-10).

use std::sync::Arc;
use std::time::Duration;

use lettre::message::Mailbox;
use lettre::transport::smtp::authentication::Credentials;
use lettre::{AsyncSmtpTransport, AsyncTransport as _, Message, Tokio1Executor};
use lockstep_core::{Event, Notify};
use lockstep_proto::action::Action;
use lockstep_proto::action::notify as args;
use serde_json::json;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::task::TaskTracker;

use crate::config::{Email, EmailSecurity};
use crate::driver::Handle;
use crate::secrets::{SecretError, Secrets, Value};

/// A message takes at most so long; a receiver that is slower may have got it or not.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Messages that are sent at a time.
const AT_A_TIME: usize = 8;

/// Messages that wait to be sent; more than these are given up, and recorded so.
pub(crate) const WAITING: usize = 256;

/// Why a message was not sent, in words for the report.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// A secret that cannot be had.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// It took too long.
    #[error("no answer within {TIMEOUT:?}")]
    Timeout,
    /// The receiver cannot be reached, or answers with an error.
    #[error("{0}")]
    Refused(String),
    /// The controller has no mail server.
    #[error("the controller's configuration has no `[email]`")]
    NoMailServer,
    /// Not a message at all.
    #[error("{0} is no message")]
    NotAMessage(&'static str),
}

/// Sends messages.
#[derive(Debug, Clone)]
pub(crate) struct Notifier {
    http: reqwest::Client,
    email: Option<Arc<Email>>,
    secrets: Secrets,
}

impl Notifier {
    /// A sender with the system's certificate authorities.
    pub(crate) fn new(email: Option<Email>, secrets: Secrets) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .timeout(TIMEOUT)
            // An address was chosen by the plan or a secret; a redirect would choose another.
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("lockstep/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Self {
            http,
            email: email.map(Arc::new),
            secrets,
        })
    }

    /// Sends what comes in until the driver is gone, and tells it what became of each message.
    pub(crate) async fn run(
        self,
        mut notices: mpsc::Receiver<Notify>,
        driver: Handle,
        tasks: TaskTracker,
    ) {
        let slots = Arc::new(Semaphore::new(AT_A_TIME));
        while let Some(notice) = notices.recv().await {
            let slot = Arc::clone(&slots).acquire_owned().await;
            let (notifier, driver) = (self.clone(), driver.clone());
            tasks.spawn(async move {
                let _slot = slot;
                let Notify {
                    rollout,
                    which,
                    action,
                } = notice;
                let error = notifier.send(&action).await.err();
                let error = error.map(|error| chain(&error));
                if let Some(error) = &error {
                    tracing::warn!(%rollout, ?which, error, "a message was not sent");
                }
                let event = Event::NoticeSent {
                    rollout,
                    which,
                    error,
                };
                // A driver that is gone has recorded that the message was ordered.
                let _ = driver.event(event).await;
            });
        }
    }

    /// Sends one message.
    pub(crate) async fn send(&self, action: &Action) -> Result<(), SendError> {
        match action {
            Action::NotifyWebhook(args::Webhook { url, text }) => {
                self.post(url, &json!({ "text": text })).await
            }
            Action::NotifySlack(args::Slack { webhook, text }) => {
                self.post(webhook, &json!({ "text": text })).await
            }
            Action::NotifyEmail(email) => {
                let sending = tokio::time::timeout(TIMEOUT, self.mail(email));
                sending.await.map_err(|_| SendError::Timeout)?
            }
            other => Err(SendError::NotAMessage(other.info().name)),
        }
    }

    async fn post(&self, url: &str, body: &serde_json::Value) -> Result<(), SendError> {
        let url = self.secrets.resolve(url)?;
        let sent = self.http.post(url.expose()).json(body).send().await;
        let answer = sent.map_err(|error| http_error(&error, &url))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let why = format!("the receiver answered {status}");
        Err(SendError::Refused(why))
    }

    async fn mail(&self, args::Email { to, subject, text }: &args::Email) -> Result<(), SendError> {
        let email = self.email.as_deref().ok_or(SendError::NoMailServer)?;
        let mailbox = |address: &str| {
            address
                .parse::<Mailbox>()
                .map_err(|error| SendError::Refused(format!("`{address}` is no address: {error}")))
        };
        let mut message = Message::builder()
            .from(mailbox(&email.from)?)
            .subject(subject);
        for address in to {
            message = message.to(mailbox(address)?);
        }
        let message = message.body(text.clone());
        let message = message.map_err(|error| SendError::Refused(error.to_string()))?;
        let sent = self.transport(email)?.send(message).await;
        sent.map(|_| ()).map_err(|error| {
            let why = format!("the mail server {}: {}", email.host, chain(&error));
            SendError::Refused(why)
        })
    }

    fn transport(&self, email: &Email) -> Result<AsyncSmtpTransport<Tokio1Executor>, SendError> {
        type Transport = AsyncSmtpTransport<Tokio1Executor>;
        let refused = |error| SendError::Refused(chain(&error));
        let mut builder = match email.security {
            EmailSecurity::Starttls => Transport::starttls_relay(&email.host).map_err(refused)?,
            EmailSecurity::Tls => Transport::relay(&email.host).map_err(refused)?,
            EmailSecurity::None => Transport::builder_dangerous(&email.host),
        };
        builder = builder.timeout(Some(TIMEOUT));
        if let Some(port) = email.port {
            builder = builder.port(port);
        }
        if let (Some(user), Some(password)) = (&email.user, &email.password) {
            let password = self.secrets.resolve(password)?;
            let password = password.expose().to_owned();
            builder = builder.credentials(Credentials::new(user.clone(), password));
        }
        Ok(builder.build())
    }
}

/// What went wrong with a request, without its address if that is secret: neither the error nor
/// its causes may name host or path.
fn http_error(error: &reqwest::Error, url: &Value) -> SendError {
    if error.is_timeout() {
        return SendError::Timeout;
    }
    let why = if !url.is_secret() {
        chain(error)
    } else if error.is_connect() {
        "the receiver cannot be reached (its address is secret)".to_owned()
    } else if error.is_builder() {
        "the secret holds no address".to_owned()
    } else {
        "the request failed (its address is secret)".to_owned()
    };
    SendError::Refused(why)
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        // Some errors repeat their cause.
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::TcpListener;

    use super::*;

    fn notifier(email: Option<Email>, secrets: Option<&std::path::Path>) -> Notifier {
        // Tests of one process share it; the first one sets it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let secrets = Secrets::new(secrets.map(Into::into));
        Notifier::new(email, secrets).unwrap()
    }

    fn secret(dir: &std::path::Path, name: &str, value: &str) {
        std::fs::write(dir.join(name), value).unwrap();
        let owner = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(dir.join(name), owner).unwrap();
    }

    /// Answers one request with a status; returns what was sent.
    async fn serve_once(status: &'static str) -> (String, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            while !request.ends_with(b"}") {
                let read = stream.read(&mut buffer).await.unwrap();
                request.extend_from_slice(&buffer[..read]);
            }
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8(request).unwrap()
        });
        (format!("http://{address}/T0/k3y"), serving)
    }

    fn slack(webhook: &str) -> Action {
        Action::NotifySlack(args::Slack {
            webhook: webhook.to_owned(),
            text: "employee-system: succeeded".to_owned(),
        })
    }

    #[tokio::test]
    async fn a_message_is_posted_to_a_secret_address() {
        let dir = tempfile::tempdir().unwrap();
        let (url, serving) = serve_once("200 OK").await;
        secret(dir.path(), "hook", &url);
        let notifier = notifier(None, Some(dir.path()));
        notifier.send(&slack("secret://hook")).await.unwrap();
        let request = serving.await.unwrap();
        assert!(request.starts_with("POST /T0/k3y HTTP/1.1"), "{request}");
        assert!(request.ends_with(r#"{"text":"employee-system: succeeded"}"#));
    }

    #[tokio::test]
    async fn an_error_never_tells_a_secret_address() {
        let dir = tempfile::tempdir().unwrap();
        let (url, serving) = serve_once("403 Forbidden").await;
        secret(dir.path(), "hook", &url);
        secret(dir.path(), "gone", "http://127.0.0.1:1/T0/k3y");
        secret(dir.path(), "wrong", "k3y, not an address");
        let notifier = notifier(None, Some(dir.path()));
        for name in ["hook", "gone", "wrong"] {
            let error = notifier.send(&slack(&format!("secret://{name}"))).await;
            let error = format!("{0} {0:?}", error.unwrap_err());
            assert!(!error.contains("127.0.0.1"), "{error}");
            assert!(!error.contains("k3y"), "{error}");
        }
        serving.await.unwrap();
        let absent = notifier.send(&slack("secret://nosuch")).await;
        let absent = chain(&absent.unwrap_err());
        assert!(absent.contains("No such file"), "{absent}");
        let plain = notifier.send(&slack("http://127.0.0.1:1/")).await;
        let plain = plain.unwrap_err().to_string();
        assert!(plain.contains("127.0.0.1:1"), "{plain}");
    }

    #[tokio::test]
    async fn mail_reaches_its_server() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (read, mut write) = stream.into_split();
            let mut lines = BufReader::new(read).lines();
            write.write_all(b"220 test\r\n").await.unwrap();
            let (mut said, mut in_data) = (Vec::new(), false);
            while let Some(line) = lines.next_line().await.unwrap() {
                let answer: &[u8] = match (in_data, line.as_str()) {
                    (true, ".") => b"250 ok\r\n",
                    (true, _) => b"",
                    (false, "DATA") => b"354 go\r\n",
                    (false, "QUIT") => b"221 bye\r\n",
                    (false, _) => b"250 ok\r\n",
                };
                in_data = line == "DATA" || (in_data && line != ".");
                let done = line == ".";
                said.push(line);
                write.write_all(answer).await.unwrap();
                if done {
                    break;
                }
            }
            said.join("\n")
        });
        let email = Email {
            host: "127.0.0.1".into(),
            port: Some(port),
            security: EmailSecurity::None,
            from: "Lockstep <lockstep@example.com>".into(),
            user: None,
            password: None,
        };
        let action = Action::NotifyEmail(args::Email {
            to: vec!["dba@example.com".into(), "qa@example.com".into()],
            subject: "employee-system".into(),
            text: "It has begun.".into(),
        });
        notifier(Some(email), None).send(&action).await.unwrap();
        let said = serving.await.unwrap();
        for expected in [
            "MAIL FROM:<lockstep@example.com>",
            "RCPT TO:<dba@example.com>",
            "RCPT TO:<qa@example.com>",
            "Subject: employee-system",
            "It has begun.",
        ] {
            assert!(said.contains(expected), "{expected} in {said}");
        }
        let unset = notifier(None, None).send(&action).await;
        assert!(matches!(unset, Err(SendError::NoMailServer)));
    }
}
