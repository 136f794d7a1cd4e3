#!/usr/bin/env bash
# Asks, rates and lists versions with grpcurl, which learns the calls from the server's reflection: no proto files.
# THUMBLOOP_ADDRESS=127.0.0.1:50051 THUMBLOOP_TOKEN=…; with TLS, give grpcurl -cacert FILE in place of -plaintext.
set -euo pipefail

# call METHOD JSON: prints the answer.
call() {
    grpcurl -plaintext ${THUMBLOOP_TOKEN:+-H "authorization: Bearer $THUMBLOOP_TOKEN"} \
        -d "$2" "${THUMBLOOP_ADDRESS:-127.0.0.1:50051}" "thumbloop.v1.$1"
}

reply=$(call PolicyService/Generate '{"text": "The soup was", "user_id": "ann"}')
echo "$reply"
id=$(sed -nE 's/.*"response_?[iI]d": "([^"]+)".*/\1/p' <<<"$reply") # old and new grpcurl name fields differently
call FeedbackService/SubmitFeedback "{\"response_id\": \"$id\", \"thumb\": \"THUMB_UP\", \"user_id\": \"ann\"}"
call AdminService/ListPolicyVersions '{}'
