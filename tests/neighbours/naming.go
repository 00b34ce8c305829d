// Go's client/v3/naming/endpoints and its gRPC resolver, as a program that tests can drive.
//
//	naming ENDPOINT SERVICE                       prints what the manager lists, as JSON, and ends
//	naming ENDPOINT SERVICE add KEY ADDR [META]   registers, META being JSON, and ends
//	naming ENDPOINT SERVICE delete KEY            deletes, and ends
//	naming ENDPOINT SERVICE watch                 prints the updates, one a line
//	naming ENDPOINT SERVICE call                  calls through etcd:///SERVICE until stopped, prints who answers
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"go.etcd.io/etcd/client/v3/naming/resolver"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

func main() {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{os.Args[1]}, DialTimeout: 5 * time.Second})
	check(err)
	defer client.Close()
	service, args := os.Args[2], append(os.Args[3:], "list")
	manager, err := endpoints.NewManager(client, service)
	check(err)
	ctx := context.Background()
	switch args[0] {
	case "list":
		listed, err := manager.List(ctx)
		check(err)
		say(listed)
	case "add":
		endpoint := endpoints.Endpoint{Addr: args[2]}
		if len(os.Args) > 6 {
			check(json.Unmarshal([]byte(args[3]), &endpoint.Metadata))
		}
		check(manager.AddEndpoint(ctx, args[1], endpoint))
	case "delete":
		check(manager.DeleteEndpoint(ctx, args[1]))
	case "watch":
		updates, err := manager.NewWatchChannel(ctx)
		check(err)
		for some := range updates {
			for _, update := range some {
				say(update)
			}
		}
	case "call":
		call(client, service)
	default:
		log.Fatalf("no such command: %s", args[0])
	}
}

// Calls a method that nobody has: whoever says so was reached.
func call(client *clientv3.Client, service string) {
	builder, err := resolver.NewBuilder(client)
	check(err)
	connection, err := grpc.NewClient("etcd:///"+service, grpc.WithResolvers(builder),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`))
	check(err)
	for {
		var from peer.Peer
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		err := connection.Invoke(ctx, "/none/None", &emptypb.Empty{}, &emptypb.Empty{}, grpc.Peer(&from))
		cancel()
		if status.Code(err) == codes.Unimplemented && from.Addr != nil {
			fmt.Println(from.Addr)
		} else {
			fmt.Println("nobody")
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func say(what any) {
	line, err := json.Marshal(what)
	check(err)
	fmt.Println(string(line))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
